// Attention of whole texts in float32; where every token reads itself and those before it, nothing behind them is computed.
#pragma once
#include "floats.h"

namespace {

constexpr int64_t QUERIES = 8, ACROSS = 32;  // of one tile

// c (QUERIES, ACROSS; rows `ldc` apart) = a (QUERIES, depth; rows `lda` apart) times b (depth, ACROSS; rows `ldb` apart).
void tile_of_floats(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  for (int64_t r = 0; r < QUERIES; r += 4)
    for (int64_t j = 0; j < ACROSS; j += 16) {
      __m256 acc[4][2];
#pragma GCC unroll 4
      for (auto& row : acc) row[0] = row[1] = _mm256_setzero_ps();
      for (int64_t d = 0; d < depth; ++d) {
        const __m256 first = _mm256_loadu_ps(b + d * ldb + j), second = _mm256_loadu_ps(b + d * ldb + j + 8);
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
          const __m256 x = _mm256_broadcast_ss(a + (r + i) * lda + d);
          acc[i][0] = _mm256_fmadd_ps(x, first, acc[i][0]);
          acc[i][1] = _mm256_fmadd_ps(x, second, acc[i][1]);
        }
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        _mm256_storeu_ps(c + (r + i) * ldc + j, acc[i][0]);
        _mm256_storeu_ps(c + (r + i) * ldc + j + 8, acc[i][1]);
      }
    }
}

AVX512 void tile_of_floats512(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  __m512 acc[QUERIES][2];
#pragma GCC unroll 8
  for (auto& row : acc) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; ++d) {
    const __m512 first = _mm512_loadu_ps(b + d * ldb), second = _mm512_loadu_ps(b + d * ldb + 16);
#pragma GCC unroll 8
    for (int64_t i = 0; i < QUERIES; ++i) {
      const __m512 x = _mm512_set1_ps(a[i * lda + d]);
      acc[i][0] = _mm512_fmadd_ps(x, first, acc[i][0]);
      acc[i][1] = _mm512_fmadd_ps(x, second, acc[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < QUERIES; ++i) {
    _mm512_storeu_ps(c + i * ldc, acc[i][0]);
    _mm512_storeu_ps(c + i * ldc + 16, acc[i][1]);
  }
}

// The first `count` of x become e^(x - the largest of them), those behind up to `padded`, a multiple of 8, become 0; returns their sum.
float exponentials(float* x, int64_t count, int64_t padded) {
  const int64_t last = (count + 7) / 8 * 8;
  std::fill(x + count, x + last, -std::numeric_limits<float>::infinity());
  __m256 most = _mm256_loadu_ps(x), sum = _mm256_setzero_ps();
  for (int64_t i = 8; i < last; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(x + i));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  const float largest = *std::max_element(lanes, lanes + 8);
  if (largest == -std::numeric_limits<float>::infinity()) {  // nothing is read
    std::fill(x, x + padded, 0.0f);
    return 1.0f;
  }
  const __m256 top = _mm256_set1_ps(largest);
  for (int64_t i = 0; i < last; i += 8) {
    const __m256 e = first_of(exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), top)), count - i);
    _mm256_storeu_ps(x + i, e);
    sum = _mm256_add_ps(sum, e);
  }
  std::fill(x + last, x + padded, 0.0f);
  return sum_of(sum);
}

// Each head of x (heads, size) turned by its position: halves (a, b) become (a cos - b sin, b cos + a sin).
void turn(float* x, int64_t heads, int64_t size, const float* cos, const float* sin) {
  const int64_t half = size / 2;
  for (float* head = x; head < x + heads * size; head += size)
    for (int64_t i = 0; i < half; ++i) {
      const float a = head[i], b = head[i + half];
      head[i] = a * cos[i] - b * sin[i];
      head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

struct Text {
  const float* at;
  int64_t batch, head, token;  // strides
  const float* of(int64_t b, int64_t h) const { return at + b * batch + h * head; }
};

Text text_of(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1 && x.scalar_type() == at::kFloat, "float32 (batch, heads, tokens, head_dim), the last contiguous");
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)};
}

// x (count): -inf where `read` is 0.
void only_read(float* x, const uint8_t* read, int64_t count) {
  const __m256 none = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i flags = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(read + i)));
    const __m256 masked = _mm256_castsi256_ps(_mm256_cmpeq_epi32(flags, _mm256_setzero_si256()));
    _mm256_storeu_ps(x + i, _mm256_blendv_ps(_mm256_loadu_ps(x + i), none, masked));
  }
  for (; i < count; ++i)
    if (!read[i]) x[i] = -std::numeric_limits<float>::infinity();
}
// query (batch, heads, queries, head_dim), key and value (batch, key heads, tokens, head_dim) -> (batch, queries, heads, head_dim): the values of all
// tokens by the softmax of their keys' products with the query times `scaling`; `causal`, for as many queries as tokens: of a query's own token and
// those before it. mask (batch or 1, 1, queries or 1, tokens): which are read of these. Key head i is for heads / key heads in a row.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask, bool causal, double scaling) {
  const Text q = text_of(query), k = text_of(key), v = text_of(value);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), size = query.size(3), key_heads = key.size(1), tokens = key.size(2);
  TORCH_CHECK(key.sizes() == value.sizes() && key.size(0) == batch && key.size(3) == size && tokens > 0, "keys and values of the same tokens");
  TORCH_CHECK(!causal || queries == tokens, queries, " queries of ", tokens, " tokens");
  TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, heads, " heads for ", key_heads, " of keys");
  const uint8_t* flags = nullptr;
  int64_t next_text = 0, next_query = 0;
  if (mask) {
    TORCH_CHECK(mask->dim() == 4 && mask->scalar_type() == at::kBool && mask->stride(3) == 1 && (mask->size(0) == 1 || mask->size(0) == batch) &&
                    mask->size(1) == 1 && (mask->size(2) == 1 || mask->size(2) == queries) && mask->size(3) == tokens,
                "mask: bool (batch or 1, 1, queries or 1, tokens), the last contiguous");
    flags = static_cast<const uint8_t*>(mask->const_data_ptr());
    next_text = mask->size(0) == 1 ? 0 : mask->stride(0);
    next_query = mask->size(2) == 1 ? 0 : mask->stride(2);
  }
  Tensor out = at::empty({batch, queries, heads, size}, query.options());
  const int64_t panels = (tokens + ACROSS - 1) / ACROSS, padded = panels * ACROSS, wide = (size + ACROSS - 1) / ACROSS * ACROSS;
  const bool zmm = has_avx512();
  const auto tile = zmm ? &tile_of_floats512 : &tile_of_floats;
  // for each head, keys as panels (size, ACROSS tokens) and values as rows of `wide`, zeros around them
  Tensor keys = at::empty({batch * key_heads, panels, size, ACROSS}, query.options()), values = at::empty({batch * key_heads, padded, wide}, query.options());
  auto *all_keys = keys.mutable_data_ptr<float>(), *all_values = values.mutable_data_ptr<float>();
  at::parallel_for(0, batch * key_heads * panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t each = first; each < last; ++each) {
      const int64_t head = each / panels, token = each % panels * ACROSS, count = std::min(ACROSS, tokens - token);
      const float *from = k.of(head / key_heads, head % key_heads) + token * k.token, *row = v.of(head / key_heads, head % key_heads) + token * v.token;
      float *panel = all_keys + each * size * ACROSS, *to = all_values + (head * padded + token) * wide;
      std::fill(panel, panel + size * ACROSS, 0.0f);
      std::fill(to, to + ACROSS * wide, 0.0f);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t d = 0; d < size; ++d) panel[d * ACROSS + t] = from[t * k.token + d];
        std::memcpy(to + t * wide, row + t * v.token, size * sizeof(float));
      }
    }
  });
  auto* result = out.mutable_data_ptr<float>();
  const int64_t blocks = (queries + QUERIES - 1) / QUERIES;
  at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> asked(QUERIES * size), weights(QUERIES * padded), attended(QUERIES * wide);
    for (int64_t each = first; each < last; ++each) {
      const int64_t head = each / blocks, number = each % blocks, text = head / heads, of = text * key_heads + head % heads / (heads / key_heads);
      const int64_t start = (number % 2 ? blocks - 1 - number / 2 : number / 2) * QUERIES;  // short and long ones in turn, for all threads the same
      const int64_t count = std::min(QUERIES, queries - start), seen = causal ? std::min(start + QUERIES, tokens) : tokens;
      const int64_t read = (seen + ACROSS - 1) / ACROSS * ACROSS;
      const float* from = q.of(text, head % heads) + start * q.token;
      for (int64_t r = 0; r < QUERIES; ++r)
        for (int64_t d = 0; d < size; ++d) asked[r * size + d] = r < count ? from[r * q.token + d] * static_cast<float>(scaling) : 0.0f;
      for (int64_t t = 0; t < read; t += ACROSS)
        tile(asked.data(), size, all_keys + (of * panels * ACROSS + t) * size, ACROSS, size, weights.data() + t, padded);
      float sums[QUERIES];
      for (int64_t r = 0; r < QUERIES; ++r) {
        float* row = weights.data() + r * padded;
        if (flags && r < count) only_read(row, flags + text * next_text + (start + r) * next_query, seen);
        sums[r] = exponentials(row, causal ? std::min(start + r + 1, tokens) : tokens, read);
      }
      for (int64_t d = 0; d < wide; d += ACROSS) tile(weights.data(), padded, all_values + of * padded * wide + d, wide, seen, attended.data() + d, wide);
      for (int64_t r = 0; r < count; ++r) {
        float* to = result + ((text * queries + start + r) * heads + head % heads) * size;
        for (int64_t d = 0; d < size; ++d) to[d] = attended[r * wide + d] / sums[r];
      }
    }
  });
  return out;
}

}  // namespace
