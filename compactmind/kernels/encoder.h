// What lies between two int8 products of an encoder block, a row at a time: attention, or scales and bias, addition and LayerNorm, or GELU; then
// rounding.
#pragma once
#include "activations.h"
#include "int8.h"

namespace {

// 0.5 x (1 + erf(x / sqrt 2)), in place; erf to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26).
void gelu(float* x, int64_t width) {
  const auto eight = [](__m256 v) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f), z = _mm256_mul_ps(v, _mm256_set1_ps(0.70710678118654752f));
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_andnot_ps(sign, z), _mm256_set1_ps(0.3275911f), one));
    __m256 y = _mm256_set1_ps(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = _mm256_fmadd_ps(y, t, _mm256_set1_ps(c));
    const __m256 rest = _mm256_mul_ps(_mm256_mul_ps(y, t), exponential(_mm256_xor_ps(_mm256_mul_ps(z, z), sign)));
    const __m256 erf = _mm256_or_ps(_mm256_sub_ps(one, rest), _mm256_and_ps(v, sign)), half = _mm256_mul_ps(v, _mm256_set1_ps(0.5f));
    return _mm256_fmadd_ps(half, erf, half);
  };
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) _mm256_storeu_ps(x + i, eight(_mm256_loadu_ps(x + i)));
  if (i < width) {
    alignas(32) float rest[8] = {};
    std::copy(x + i, x + width, rest);
    _mm256_store_ps(rest, eight(_mm256_load_ps(rest)));
    std::copy(rest, rest + (width - i), x + i);
  }
}

// x (width) = (x - mean) / sqrt(variance + eps) * weight + bias.
void layer_norm(float* x, const float* weight, const float* bias, int64_t width, double eps) {
  __m256 sums = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) sums = _mm256_add_ps(sums, _mm256_loadu_ps(x + i));
  float sum = sum_of(sums), square = 0.0f;
  for (; i < width; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(width);
  for (i = 0; i + 8 <= width; i += 8) {
    const __m256 v = _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(mean));
    squares = _mm256_fmadd_ps(v, v, squares);
  }
  square = sum_of(squares);
  for (; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(square / static_cast<float>(width) + static_cast<float>(eps));
  for (i = 0; i < width; ++i) x[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

// Rows of a product: int32 of another kernel with the scales to come, or float32 that has them.
struct Product {
  const int32_t* sums = nullptr;
  const float *values = nullptr, *rows = nullptr, *channels = nullptr, *bias = nullptr;
  int64_t width;

  Product(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale, const optional<Tensor>& added)
      : width(product.size(1)) {
    TORCH_CHECK(product.dim() == 2 && product.is_contiguous(), "product: contiguous (rows, channels)");
    TORCH_CHECK(!added || (added->is_contiguous() && added->scalar_type() == at::kFloat && added->numel() == width), "bias: float32 (channels,)");
    bias = added ? added->const_data_ptr<float>() : nullptr;
    if (product.scalar_type() == at::kFloat) {
      TORCH_CHECK(!row_scale && !channel_scale && !added, "float32 has its scales and bias");
      values = product.const_data_ptr<float>();
      return;
    }
    TORCH_CHECK(product.scalar_type() == at::kInt && row_scale && row_scale->is_contiguous() && row_scale->numel() == product.size(0) && channel_scale &&
                    channel_scale->is_contiguous() && channel_scale->numel() == width,
                "int32 with a scale for each row and each channel");
    sums = product.const_data_ptr<int32_t>();
    rows = row_scale->const_data_ptr<float>();
    channels = channel_scale->const_data_ptr<float>();
  }

  void row(int64_t r, float* to) const {
    if (values) {
      std::memcpy(to, values + r * width, width * sizeof(float));
      return;
    }
    const int32_t* from = sums + r * width;
    for (int64_t j = 0; j < width; ++j) {
      const float scaled = static_cast<float>(from[j]) * channels[j] * rows[r];
      to[j] = bias ? scaled + bias[j] : scaled;
    }
  }
};

int64_t rows_at_once(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)); }

// GELU of a product (rows, width) -> int8 and the scale of each row.
std::tuple<Tensor, Tensor> gelu_quantize(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale,
                                         const optional<Tensor>& bias) {
  const Product from(product, row_scale, channel_scale, bias);
  const int64_t rows = product.size(0), width = from.width;
  Tensor q = at::empty({rows, width}, product.options().dtype(at::kChar)), scale = at::empty({rows, 1}, product.options().dtype(at::kFloat));
  auto* to = q.mutable_data_ptr<int8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows, rows_at_once(width), [&](int64_t first, int64_t last) {
    std::vector<float> row(width);
    for (int64_t r = first; r < last; ++r) {
      from.row(r, row.data());
      gelu(row.data(), width);
      scales[r] = quantize_row(row.data(), width, 0.0f, to + r * width);
    }
  });
  return {q, scale};
}

// LayerNorm of product + residual (rows, width), and that as int8 with the scale of each row.
std::tuple<Tensor, Tensor, Tensor> add_norm_quantize(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale,
                                                     const optional<Tensor>& bias, const Tensor& residual, const Tensor& norm, const Tensor& norm_bias,
                                                     double eps) {
  const Product from(product, row_scale, channel_scale, bias);
  const int64_t rows = product.size(0), width = from.width;
  TORCH_CHECK(residual.is_contiguous() && residual.scalar_type() == at::kFloat && residual.sizes() == product.sizes(), "residual: float32 as the product");
  for (const Tensor& each : {norm, norm_bias})
    TORCH_CHECK(each.is_contiguous() && each.scalar_type() == at::kFloat && each.numel() == width, "norm and its bias: float32 (channels,)");
  Tensor out = at::empty({rows, width}, residual.options()), scale = at::empty({rows, 1}, residual.options());
  Tensor q = at::empty({rows, width}, residual.options().dtype(at::kChar));
  const auto *added = residual.const_data_ptr<float>(), *weight = norm.const_data_ptr<float>(), *shift = norm_bias.const_data_ptr<float>();
  auto *to = out.mutable_data_ptr<float>(), *scales = scale.mutable_data_ptr<float>();
  auto* bytes = q.mutable_data_ptr<int8_t>();
  at::parallel_for(0, rows, rows_at_once(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* y = to + r * width;
      from.row(r, y);
      for (int64_t j = 0; j < width; ++j) y[j] += added[r * width + j];
      layer_norm(y, weight, shift, width, eps);
      scales[r] = quantize_row(y, width, 0.0f, bytes + r * width);
    }
  });
  return {out, q, scale};
}

// What is added to the scores of a sentence's tokens: of a mask (sentences or 1, 1, tokens or 1, tokens), numbers or whether a key is read.
struct Mask {
  const void* values = nullptr;
  bool is_bool = false;
  int64_t of_sentence = 0, of_query = 0, of_key = 0;

  Mask(const optional<Tensor>& mask, int64_t sentences, int64_t tokens) {
    if (!mask) return;
    const auto sizes = mask->sizes();
    TORCH_CHECK(mask->dim() == 4 && (sizes[0] == 1 || sizes[0] == sentences) && sizes[1] == 1 && (sizes[2] == 1 || sizes[2] == tokens) && sizes[3] == tokens,
                "mask: (sentences or 1, 1, tokens or 1, tokens)");
    is_bool = mask->scalar_type() == at::kBool;
    TORCH_CHECK(is_bool || mask->scalar_type() == at::kFloat, "mask: bool or float32");
    values = mask->const_data_ptr();
    of_sentence = sizes[0] == 1 ? 0 : mask->stride(0);
    of_query = sizes[2] == 1 ? 0 : mask->stride(2);
    of_key = mask->stride(3);
  }

  void add(int64_t sentence, int64_t query, int64_t tokens, float* scores) const {
    const int64_t from = sentence * of_sentence + query * of_query;
    if (!values) return;
    if (is_bool) {
      const bool* reads = static_cast<const bool*>(values) + from;
      for (int64_t j = 0; j < tokens; ++j) scores[j] = reads[j * of_key] ? scores[j] : -1e30f;
    } else {
      const float* added = static_cast<const float*>(values) + from;
      for (int64_t j = 0; j < tokens; ++j) scores[j] += added[j * of_key];
    }
  }
};

// x (width), a multiple of 8 of which `count` are meant, becomes e^(x - max); returns the sum, no number if one of them is none.
float exponentials(float* x, int64_t count, int64_t width) {
  const float top = *std::max_element(x, x + count);
  std::fill(x + count, x + width, -std::numeric_limits<float>::infinity());
  __m256 sums = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
  for (int64_t i = 0; i < width; i += 8) {
    const __m256 below = _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(top)), y = exponential(below);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(below, below, _CMP_UNORD_Q));
    _mm256_storeu_ps(x + i, y);
    sums = _mm256_add_ps(sums, y);
  }
  return _mm256_movemask_ps(unordered) ? std::numeric_limits<float>::quiet_NaN() : sum_of(sums);
}

constexpr int64_t QUERIES = 4, KEYS = 16;

// scores (QUERIES, width) = the rows of q (depth) times kt (depth, width), width a multiple of KEYS.
void scores_of(const float* const* q, const float* kt, int64_t depth, int64_t width, float scaling, float* scores) {
  const __m256 factor = _mm256_set1_ps(scaling);
  for (int64_t j = 0; j < width; j += KEYS) {
    __m256 acc[QUERIES][2];
    for (auto& row : acc) row[0] = row[1] = _mm256_setzero_ps();
    for (int64_t d = 0; d < depth; ++d) {
      const __m256 first = _mm256_loadu_ps(kt + d * width + j), second = _mm256_loadu_ps(kt + d * width + j + 8);
      for (int64_t r = 0; r < QUERIES; ++r) {
        const __m256 each = _mm256_set1_ps(q[r][d]);
        acc[r][0] = _mm256_fmadd_ps(each, first, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(each, second, acc[r][1]);
      }
    }
    for (int64_t r = 0; r < QUERIES; ++r)
      for (int64_t h = 0; h < 2; ++h) _mm256_storeu_ps(scores + r * width + j + 8 * h, _mm256_mul_ps(acc[r][h], factor));
  }
}

// The first `rows` of out (QUERIES, apart), 8 * VECTORS columns = weights (QUERIES, width) times v (count, stride), over the sums of the weights.
template <int VECTORS>
void weighted(const float* weights, int64_t width, const float* v, int64_t stride, int64_t count, const float* sums, int64_t rows, int64_t apart, float* out) {
  __m256 acc[QUERIES][VECTORS];
  for (auto& row : acc)
    for (auto& each : row) each = _mm256_setzero_ps();
  for (int64_t j = 0; j < count; ++j) {
    __m256 value[VECTORS];
    for (int h = 0; h < VECTORS; ++h) value[h] = _mm256_loadu_ps(v + j * stride + 8 * h);
    for (int64_t r = 0; r < QUERIES; ++r) {
      const __m256 weight = _mm256_set1_ps(weights[r * width + j]);
      for (int h = 0; h < VECTORS; ++h) acc[r][h] = _mm256_fmadd_ps(weight, value[h], acc[r][h]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int h = 0; h < VECTORS; ++h) _mm256_storeu_ps(out + r * apart + 8 * h, _mm256_div_ps(acc[r][h], _mm256_set1_ps(sums[r])));
}

// k (tokens, stride), `depth` columns of it, -> kt (depth, width), 0 behind the tokens.
void transposed(const float* k, int64_t stride, int64_t tokens, int64_t depth, int64_t width, float* kt) {
  for (int64_t j = 0; j < width; j += 8)
    for (int64_t d = 0; d < depth; d += 8) {
      __m256i rows[8];
      for (int64_t r = 0; r < 8; ++r)
        rows[r] = j + r < tokens ? _mm256_castps_si256(_mm256_loadu_ps(k + (j + r) * stride + d)) : _mm256_setzero_si256();
      transpose8(rows);
      for (int64_t r = 0; r < 8; ++r) _mm256_storeu_ps(kt + (d + r) * width + j, _mm256_castsi256_ps(rows[r]));
    }
}

// Attention of every sentence to itself: heads (sentences * tokens, 3 * channels), queries, keys and values next to each other -> what its heads
// read next to each other (sentences * tokens, channels) as int8, and the scale of each row.
std::tuple<Tensor, Tensor> attend_quantize(const Tensor& heads, const optional<Tensor>& mask, int64_t sentences, int64_t head_dim, double scaling) {
  TORCH_CHECK(heads.dim() == 2 && heads.is_contiguous() && heads.scalar_type() == at::kFloat, "heads: contiguous float32 (tokens, 3 * channels)");
  TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0 && heads.size(1) % (3 * head_dim) == 0, "heads of ", head_dim, " channels do not fit, or are no multiple of 8");
  TORCH_CHECK(sentences > 0 && heads.size(0) % sentences == 0, "rows: those of ", sentences, " sentences of one length");
  const int64_t rows = heads.size(0), tokens = rows / sentences, stride = heads.size(1), channels = stride / 3, width = (tokens + KEYS - 1) / KEYS * KEYS;
  const Mask added(mask, sentences, tokens);
  Tensor q = at::empty({rows, channels}, heads.options().dtype(at::kChar)), scale = at::empty({rows, 1}, heads.options());
  const auto* from = heads.const_data_ptr<float>();
  auto* to = q.mutable_data_ptr<int8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(QUERIES, 16384 / std::max<int64_t>(channels * tokens / 64, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> kt(head_dim * width), scores(QUERIES * width), out((std::min(end - begin, tokens) + QUERIES) * channels);
    while (begin < end) {
      const int64_t sentence = begin / tokens, start = sentence * tokens, last = std::min(end, start + tokens);
      for (int64_t c = 0; c < channels; c += head_dim) {
        const float* values = from + start * stride + 2 * channels + c;
        transposed(from + start * stride + channels + c, stride, tokens, head_dim, width, kt.data());
        for (int64_t row = begin; row < last; row += QUERIES) {
          const int64_t count = std::min(QUERIES, last - row);
          const float* queries[QUERIES];
          float sums[QUERIES];
          for (int64_t r = 0; r < QUERIES; ++r) queries[r] = from + (row + std::min(r, count - 1)) * stride + c;
          scores_of(queries, kt.data(), head_dim, width, static_cast<float>(scaling), scores.data());
          for (int64_t r = 0; r < QUERIES; ++r) {
            added.add(sentence, row + std::min(r, count - 1) - start, tokens, scores.data() + r * width);
            sums[r] = exponentials(scores.data() + r * width, tokens, width);
          }
          float* y = out.data() + (row - begin) * channels + c;
          int64_t d = 0;
          for (; d + 32 <= head_dim; d += 32) weighted<4>(scores.data(), width, values + d, stride, tokens, sums, count, channels, y + d);
          for (; d < head_dim; d += 8) weighted<1>(scores.data(), width, values + d, stride, tokens, sums, count, channels, y + d);
        }
      }
      for (int64_t row = begin; row < last; ++row) scales[row] = quantize_row(out.data() + (row - begin) * channels, channels, 0.0f, to + row * channels);
      begin = last;
    }
  });
  return {q, scale};
}

}  // namespace
