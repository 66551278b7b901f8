// Rounding column by column, the columns behind making up for each error (GPTQ): the chains of small steps of gptq.py and
// error_compensation.py of methods/quantization, for a few outputs at a time through all columns.
#pragma once
#include "fit.h"

namespace {

constexpr int64_t OUTPUTS = 64;  // at a time: with 128 columns of them 32 KiB

// The number of `boundaries` below x, in every place: torch.bucketize.
__m256i places(__m256 x, const float* boundaries, int64_t count) {
  __m256i found = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; ++i)
    found = _mm256_sub_epi32(found, _mm256_castps_si256(_mm256_cmp_ps(_mm256_set1_ps(boundaries[i]), x, _CMP_LT_OQ)));
  return found;
}

std::vector<float> between(const float* levels, int64_t count) {
  std::vector<float> boundaries(count - 1);
  for (int64_t i = 0; i + 1 < count; ++i) boundaries[i] = (levels[i + 1] + levels[i]) / 2;
  return boundaries;
}

void check_columns(const Tensor& block, const Tensor& factor) {
  TORCH_CHECK(block.dim() == 2 && block.is_contiguous() && block.scalar_type() == at::kFloat, "block: contiguous float32 (columns, out)");
  TORCH_CHECK(factor.dim() == 2 && factor.size(0) == block.size(0) && factor.size(1) == block.size(0) && factor.stride(1) == 1 &&
                  factor.scalar_type() == at::kFloat,
              "factor: float32 (columns, columns), its rows contiguous");
}

// Lets `of_column` say of every column of block (columns, out) what is left of 8 weights: (column, output, how many, weights) -> errors, which
// are divided by the diagonal of the factor, written and taken from the columns behind.
template <class F>
Tensor shift_errors(const Tensor& block, const Tensor& factor, F of_column) {
  check_columns(block, factor);
  const int64_t columns = block.size(0), out = block.size(1), apart = factor.stride(0);
  Tensor errors = at::empty(block.sizes(), block.options());
  const auto *from = block.const_data_ptr<float>(), *f = factor.const_data_ptr<float>();
  auto* to = errors.mutable_data_ptr<float>();
  at::parallel_for(0, (out + OUTPUTS - 1) / OUTPUTS, 1, [&](int64_t first, int64_t last) {
    std::vector<float> weights(columns * OUTPUTS);
    float error[OUTPUTS];
    for (int64_t start = first * OUTPUTS; start < std::min(out, last * OUTPUTS); start += OUTPUTS) {
      const int64_t count = std::min(OUTPUTS, out - start);
      std::fill(weights.begin(), weights.end(), 0.0f);
      for (int64_t c = 0; c < columns; ++c) std::copy_n(from + c * out + start, count, &weights[c * OUTPUTS]);
      for (int64_t c = 0; c < columns; ++c) {
        const __m256 by = _mm256_set1_ps(f[c * apart + c]);
        for (int64_t i = 0; i < count; i += 8) {
          const __m256 left = of_column(c, start + i, std::min<int64_t>(8, count - i), _mm256_loadu_ps(&weights[c * OUTPUTS + i]));
          _mm256_storeu_ps(error + i, _mm256_div_ps(left, by));
        }
        std::copy_n(error, count, to + c * out + start);
        for (int64_t behind = c + 1; behind < columns; ++behind) {
          const __m256 share = _mm256_set1_ps(f[c * apart + behind]);
          float* row = &weights[behind * OUTPUTS];
          for (int64_t i = 0; i < count; i += 8)
            _mm256_storeu_ps(row + i, _mm256_sub_ps(_mm256_loadu_ps(row + i), _mm256_mul_ps(share, _mm256_loadu_ps(error + i))));
        }
      }
    }
  });
  return errors;
}

// Up to 8 floats; what is missing is `filling`.
__m256 load_some(const float* from, int64_t count, float filling) {
  if (count == 8) return _mm256_loadu_ps(from);
  alignas(32) float eight[8];
  std::fill_n(eight, 8, filling);
  std::copy_n(from, count, eight);
  return _mm256_load_ps(eight);
}

void store_some(float* to, int64_t count, __m256 v) {
  alignas(32) float eight[8];
  _mm256_store_ps(eight, v);
  std::copy_n(eight, count, to);
}

// block (columns, out) with one scale and zero for each output -> integers uint8 and errors, both (columns, out); `zero_kind` as ZEROS of grid.py.
std::tuple<Tensor, Tensor> round_columns(const Tensor& block, const Tensor& factor, const Tensor& scale, const Tensor& zero, int64_t bits,
                                         int64_t zero_kind) {
  const int64_t out = block.size(1);
  TORCH_CHECK(scale.is_contiguous() && scale.numel() == out && zero.is_contiguous() && zero.numel() == out, "a scale and a zero for each output");
  Tensor integers = at::empty(block.sizes(), block.options().dtype(at::kByte));
  const auto *s = scale.const_data_ptr<float>(), *z = zero.const_data_ptr<float>();
  auto* q = integers.mutable_data_ptr<uint8_t>();
  const __m256 top = _mm256_set1_ps(static_cast<float>((1 << bits) - 1)), none = _mm256_setzero_ps();
  const bool minimum = zero_kind == MINIMUM;
  Tensor errors = shift_errors(block, factor, [&](int64_t column, int64_t at, int64_t count, __m256 w) {
    const __m256 by = load_some(s + at, count, 1.0f), off = load_some(z + at, count, 0.0f);
    __m256 level = minimum ? _mm256_div_ps(_mm256_sub_ps(w, off), by) : _mm256_add_ps(_mm256_div_ps(w, by), off);
    level = _mm256_round_ps(level, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    level = _mm256_min_ps(_mm256_max_ps(level, none), top);
    alignas(32) int32_t eight[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(eight), _mm256_cvtps_epi32(level));
    for (int64_t i = 0; i < count; ++i) q[column * out + at + i] = static_cast<uint8_t>(eight[i]);
    return _mm256_sub_ps(w, minimum ? _mm256_add_ps(_mm256_mul_ps(level, by), off) : _mm256_mul_ps(_mm256_sub_ps(level, off), by));
  });
  return {integers, errors};
}

// block (columns, out) to sorted `levels`, each times the scale of its place; where `pinned`, to the sign -> what they are rounded to, and errors
// against the level times `decoded`, all (columns, out).
std::tuple<Tensor, Tensor> round_columns_to_levels(const Tensor& block, const Tensor& factor, const Tensor& pinned, const Tensor& sign,
                                                   const Tensor& scale, const Tensor& decoded, const Tensor& levels) {
  for (const Tensor& each : {pinned, sign, scale, decoded})
    TORCH_CHECK(each.sizes() == block.sizes() && each.is_contiguous(), "pinned, sign and scales: contiguous, of the block's shape");
  TORCH_CHECK(levels.is_contiguous() && levels.numel() > 1 && levels.scalar_type() == at::kFloat, "levels: contiguous float32");
  const int64_t out = block.size(1), count_of = levels.numel();
  Tensor rounded = at::empty(block.sizes(), block.options());
  const auto *pins = pinned.const_data_ptr<bool>();
  const auto *signs = sign.const_data_ptr<float>(), *scales = scale.const_data_ptr<float>(), *backs = decoded.const_data_ptr<float>();
  const auto* known = levels.const_data_ptr<float>();
  const std::vector<float> boundaries = between(known, count_of);
  auto* to = rounded.mutable_data_ptr<float>();
  const __m256 least = _mm256_set1_ps(1e-12f);
  Tensor errors = shift_errors(block, factor, [&](int64_t column, int64_t at, int64_t count, __m256 w) {
    const int64_t place = column * out + at;
    const __m256 back = load_some(backs + place, count, 1.0f);
    const __m256i nearest = places(_mm256_div_ps(w, _mm256_max_ps(back, least)), boundaries.data(), count_of - 1);
    alignas(32) float level[8];
    _mm256_store_ps(level, _mm256_i32gather_ps(known, nearest, 4));
    for (int64_t i = 0; i < count; ++i)
      if (pins[place + i]) level[i] = signs[place + i];
    const __m256 chosen = _mm256_load_ps(level);
    store_some(to + place, count, _mm256_mul_ps(chosen, load_some(scales + place, count, 1.0f)));
    return _mm256_sub_ps(w, _mm256_mul_ps(chosen, back));
  });
  return {rounded, errors};
}

// weight (blocks, size), counts (some, size), which block number i has i % some of -> the weight, every block cut off at that of `shares` of its
// largest weight where rounding it to `levels` errs least.
Tensor cut_off(const Tensor& weight, const Tensor& counts, const Tensor& levels, at::ArrayRef<double> shares) {
  const int64_t blocks = weight.size(0), size = weight.size(1), some = counts.size(0), count_of = levels.numel();
  const bool fits = weight.is_contiguous() && counts.is_contiguous() && levels.is_contiguous() && weight.scalar_type() == at::kFloat &&
                    counts.scalar_type() == at::kFloat && levels.scalar_type() == at::kFloat && counts.size(1) == size && size % 8 == 0 &&
                    some > 0 && blocks % some == 0 && count_of > 1;
  TORCH_CHECK(fits, "not blocks of a multiple of 8 weights ", weight.sizes(), " and how much they count ", counts.sizes());
  Tensor result = at::empty(weight.sizes(), weight.options());
  const auto *from = weight.const_data_ptr<float>(), *with = counts.const_data_ptr<float>(), *known = levels.const_data_ptr<float>();
  const std::vector<float> boundaries = between(known, count_of);
  auto* to = result.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, std::max<int64_t>(1, 4096 / size), [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const float *w = from + block * size, *c = with + block % some * size;
      float largest = 0;
      for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(w[i]));
      float limit = largest, lowest = std::numeric_limits<float>::infinity();
      for (const double share : shares) {
        const float tried = static_cast<float>(share) * largest;
        const __m256 reach = _mm256_set1_ps(tried), by = _mm256_set1_ps(std::max(tried, 1e-12f));
        __m256 error = _mm256_setzero_ps();
        for (int64_t i = 0; i < size; i += 8) {
          const __m256 x = _mm256_loadu_ps(w + i);
          const __m256 level = _mm256_i32gather_ps(known, places(_mm256_div_ps(x, by), boundaries.data(), count_of - 1), 4);
          const __m256 off = _mm256_sub_ps(_mm256_mul_ps(reach, level), x);
          error = _mm256_fmadd_ps(_mm256_mul_ps(off, off), _mm256_loadu_ps(c + i), error);
        }
        if (const float sum = sum_of(error); sum < lowest) lowest = sum, limit = tried;
      }
      const __m256 high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
      for (int64_t i = 0; i < size; i += 8)
        _mm256_storeu_ps(to + block * size + i, _mm256_max_ps(_mm256_min_ps(_mm256_loadu_ps(w + i), high), low));
    }
  });
  return result;
}

}  // namespace
