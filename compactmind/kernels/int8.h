// int8 times int8, exact in int32.
#pragma once
#include <cpuid.h>

#include "floats.h"

namespace {

// Both sides are widened to int16 and multiplied in pairs (vpmaddwd). vpmaddubsw takes twice as many at a time, but its sums of 16 bits
// saturate, and it needs a vpmaddwd too to add them up: as many multiplications in all.
constexpr int64_t MR = 6, VECTORS = 2, NR = 8 * VECTORS, KC = 768;

int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

__m256i widened(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

struct Scales {
  const float *row, *channel, *bias;  // bias may be missing
};

// x (ROWS, stride) int16 with zeros behind the width k, times w (n, k): the channels from n0 to n1 of out (ROWS, n).
template <int ROWS>
void few_rows(const int16_t* x, int64_t stride, const int8_t* w, int64_t k, int64_t n0, int64_t n1, Scales scales, float* out, int64_t n) {
  for (int64_t j = n0; j < n1; ++j) {
    const int8_t* row = w + j * k;
    __m256i acc[ROWS][2];
    for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    const auto add = [&](const int8_t* weights, int64_t at) {
      const __m256i a = widened(weights), b = widened(weights + 16);
      for (int r = 0; r < ROWS; ++r) {
        const auto* from = reinterpret_cast<const __m256i*>(x + r * stride + at);
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, _mm256_loadu_si256(from)));
        acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(b, _mm256_loadu_si256(from + 1)));
      }
    };
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) add(row + i, i);
    if (i < k) {
      alignas(32) int8_t rest[32] = {};
      std::memcpy(rest, row + i, k - i);
      add(rest, i);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float y = static_cast<float>(sum_of(_mm256_add_epi32(acc[r][0], acc[r][1]))) * scales.channel[j] * scales.row[r];
      out[r * n + j] = scales.bias ? y + scales.bias[j] : y;
    }
  }
}

// y (n) = sums of int8 products, times the scale of each channel and of the row, plus the bias if there is one.
void scale_row(const int32_t* sums, const float* channels, float row, const float* bias, int64_t n, float* y) {
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = static_cast<float>(sums[j]) * channels[j] * row;
    y[j] = bias ? scaled + bias[j] : scaled;
  }
}

// x (m, k) int8, m from 1 to FEW, times w (n, k), scaled: y (m, n).
void few_int8(const int8_t* x, int64_t m, int64_t k, const int8_t* w, int64_t n, Scales scales, float* y) {
  const int64_t at_once = std::max<int64_t>(16, 65536 / std::max<int64_t>(k, 1));
  if (has_avx512()) {
    const int64_t stride = (k + 63) / 64 * 64;
    std::vector<int8_t> padded(m * stride, 0);
    std::vector<uint32_t> excess(m, 0);
    for (int64_t r = 0; r < m; ++r) {
      std::memcpy(padded.data() + r * stride, x + r * k, k);
      int64_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += x[r * k + i];
      excess[r] = static_cast<uint32_t>(128 * sum);
    }
    std::vector<int32_t> sums(m * n);
    const auto run = m == 1 ? few_sums64<1> : m == 2 ? few_sums64<2> : m == 3 ? few_sums64<3> : few_sums64<4>;
    at::parallel_for(0, n, at_once, [&](int64_t n0, int64_t n1) {
      run(padded.data(), stride, excess.data(), w, k, n0, n1, sums.data(), n);
      for (int64_t r = 0; r < m; ++r)
        scale_row(sums.data() + r * n + n0, scales.channel + n0, scales.row[r], scales.bias ? scales.bias + n0 : nullptr, n1 - n0, y + r * n + n0);
    });
    return;
  }
  const int64_t stride = (k + 31) / 32 * 32;
  std::vector<int16_t> wide(m * stride, 0);
  for (int64_t r = 0; r < m; ++r) std::copy(x + r * k, x + (r + 1) * k, wide.begin() + r * stride);
  const auto run = m == 1 ? few_rows<1> : m == 2 ? few_rows<2> : m == 3 ? few_rows<3> : few_rows<4>;
  at::parallel_for(0, n, at_once, [&](int64_t n0, int64_t n1) { run(wide.data(), stride, w, k, n0, n1, scales, y, n); });
}

// 8 rows of 8 int32 become 8 columns.
void transpose8(__m256i* r) {
  __m256i t[8], s[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    s[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    s[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x31);
  }
}

// `depth` columns, from column k0 on, of up to 8 rows of int8 (rows, k), from row `first` on, as int16 pairs of columns: (depth / 2, apart,
// 2). What is missing is 0. With `apart` below 8 the next pair overwrites what is too much, and the last one writes behind its end.
void pack(const int8_t* from, int64_t rows, int64_t k, int64_t first, int64_t k0, int64_t depth, int64_t apart, int16_t* to) {
  for (int64_t i = 0; i < depth; i += 16) {
    const int64_t left = std::min<int64_t>(16, k - (k0 + i));
    __m256i r[8];
    for (int64_t row = 0; row < 8; ++row) {
      const int8_t* at = from + (first + row) * k + k0 + i;
      if (first + row >= rows || row >= apart) {
        r[row] = _mm256_setzero_si256();
      } else if (left == 16) {
        r[row] = widened(at);
      } else {
        int8_t rest[16] = {};
        std::memcpy(rest, at, left);
        r[row] = widened(rest);
      }
    }
    transpose8(r);
    for (int64_t pair = 0; pair < 8; ++pair)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (i / 2 + pair) * apart * 2), r[pair]);
  }
}

// c (MR, NR) int32 = or += a (depth / 2, MR, 2) times b (depth / 2, NR, 2).
void tile(const int16_t* a, const int16_t* b, int64_t depth, int32_t* c, bool add) {
  __m256i acc[MR][VECTORS];
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h)
      acc[r][h] = add ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * NR + 8 * h)) : _mm256_setzero_si256();
  for (int64_t i = 0; i < depth / 2; ++i) {
    __m256i weights[VECTORS];
    for (int h = 0; h < VECTORS; ++h) weights[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + (i * VECTORS + h) * 16));
    for (int r = 0; r < MR; ++r) {
      int32_t two;
      std::memcpy(&two, a + (i * MR + r) * 2, sizeof two);
      const __m256i x = _mm256_set1_epi32(two);
      for (int h = 0; h < VECTORS; ++h) acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(x, weights[h]));
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * NR + 8 * h), acc[r][h]);
}

// AVX-VNNI multiplies four bytes without a sign by four with one and adds all up, exact (vpdpbusd): inputs have 128 added, and 128 times the sum
// of a channel's weights is taken off again. Sums that wrap on the way come back.
#if defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 12
#define KNOWS_AVX_VNNI 1

// As `pack`, columns in fours: (depth / 4, apart, 4) bytes, `depth` a multiple of 32, and each byte with the bits of `flip` turned.
void pack4(const int8_t* from, int64_t rows, int64_t k, int64_t first, int64_t k0, int64_t depth, int64_t apart, uint8_t flip, uint8_t* to) {
  for (int64_t i = 0; i < depth; i += 32) {
    const int64_t left = std::min<int64_t>(32, k - (k0 + i));
    __m256i r[8];
    for (int64_t row = 0; row < 8; ++row) {
      const int8_t* at = from + (first + row) * k + k0 + i;
      if (first + row >= rows || row >= apart) {
        r[row] = _mm256_setzero_si256();
      } else {
        alignas(32) int8_t rest[32] = {};
        if (left < 32) std::memcpy(rest, at, left);
        const __m256i bytes = left < 32 ? _mm256_load_si256(reinterpret_cast<const __m256i*>(rest)) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        r[row] = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(flip)));
      }
    }
    transpose8(r);
    for (int64_t four = 0; four < 8; ++four)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (i / 4 + four) * apart * 4), r[four]);
  }
}

// What is to be taken off: 128 times the sums of b (depth / 4, NR, 4) over its columns.
__attribute__((target("avx2,fma,avxvnni"))) void excess(const uint8_t* b, int64_t depth, __m256i* found) {
  for (int h = 0; h < VECTORS; ++h) found[h] = _mm256_setzero_si256();
  for (int64_t i = 0; i < depth / 4; ++i)
    for (int h = 0; h < VECTORS; ++h)
      found[h] = _mm256_dpbusd_avx_epi32(found[h], _mm256_set1_epi8(-128), _mm256_load_si256(reinterpret_cast<const __m256i*>(b + (i * VECTORS + h) * 32)));
}

__attribute__((target("avx2,fma,avxvnni"))) void tile4(const uint8_t* a, const uint8_t* b, const __m256i* off, int64_t depth, int32_t* c, bool add) {
  __m256i acc[MR][VECTORS];
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h)
      acc[r][h] = _mm256_sub_epi32(add ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * NR + 8 * h)) : _mm256_setzero_si256(), off[h]);
  for (int64_t i = 0; i < depth / 4; ++i) {
    __m256i weights[VECTORS];
    for (int h = 0; h < VECTORS; ++h) weights[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + (i * VECTORS + h) * 32));
    for (int r = 0; r < MR; ++r) {
      int32_t four;
      std::memcpy(&four, a + (i * MR + r) * 4, sizeof four);
      const __m256i x = _mm256_set1_epi32(four);
      for (int h = 0; h < VECTORS; ++h) acc[r][h] = _mm256_dpbusd_avx_epi32(acc[r][h], x, weights[h]);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * NR + 8 * h), acc[r][h]);
}
#endif

// Whether the CPU has AVX-VNNI (leaf 7, subleaf 1, bit 4 of EAX) and the compiler knew it.
bool has_avx_vnni() {
#ifdef KNOWS_AVX_VNNI
  unsigned a = 0, b = 0, c = 0, d = 0;
  static const bool found = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  return found;
#else
  return false;
#endif
}

// The rows of c (m, NR) int32, scaled, into the columns from j on of out (m, n).
void scaled(const int32_t* c, int64_t m, int64_t j, int64_t n, Scales scales, float* out) {
  const int64_t columns = std::min(NR, n - j);
  float channel[NR] = {}, bias[NR] = {}, y[NR];
  std::memcpy(channel, scales.channel + j, columns * sizeof(float));
  if (scales.bias) std::memcpy(bias, scales.bias + j, columns * sizeof(float));
  for (int64_t r = 0; r < m; ++r) {
    const __m256 row = _mm256_set1_ps(scales.row[r]);
    float* to = columns == NR ? out + r * n + j : y;
    for (int h = 0; h < VECTORS; ++h) {
      const __m256 sums = _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * NR + 8 * h)));
      const __m256 product = _mm256_mul_ps(_mm256_mul_ps(sums, _mm256_loadu_ps(channel + 8 * h)), row);
      _mm256_storeu_ps(to + 8 * h, scales.bias ? _mm256_add_ps(product, _mm256_loadu_ps(bias + 8 * h)) : product);
    }
    if (columns < NR) std::memcpy(out + r * n + j, y, columns * sizeof(float));
  }
}

// `vnni`: with AVX-VNNI where the CPU has it.
Tensor int8_linear(const Tensor& q, const Tensor& row_scale, const Tensor& weight, const Tensor& channel_scale, const optional<Tensor>& bias,
                   bool vnni) {
  const int64_t m = q.size(0), k = q.size(1), n = weight.size(0);
  TORCH_CHECK(q.is_contiguous() && weight.is_contiguous() && weight.size(1) == k, "q (rows, in) and weight (out, in): contiguous int8");
  TORCH_CHECK(row_scale.is_contiguous() && row_scale.numel() == m && channel_scale.is_contiguous() && channel_scale.numel() == n,
              "a scale for each row and each channel");
  TORCH_CHECK(k <= 131072, "sums of more than 131,072 products do not fit into 32 bits");
  Tensor out = at::empty({m, n}, q.options().dtype(at::kFloat));
  const auto *x = q.const_data_ptr<int8_t>(), *w = weight.const_data_ptr<int8_t>();
  const Scales scales{row_scale.const_data_ptr<float>(), channel_scale.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr};
  auto* y = out.mutable_data_ptr<float>();
  if (m <= FEW) {
    if (m > 0) few_int8(x, m, k, w, n, scales, y);
    return out;
  }
  const int64_t panels = (m + MR - 1) / MR, whole = (n + NR - 1) / NR;
#ifdef KNOWS_AVX_VNNI
  if (vnni && has_avx_vnni()) {
    const int64_t depth32 = (k + 31) / 32 * 32, stride = MR * depth32 + 32;
    Tensor packed = at::empty({panels * stride}, q.options().dtype(at::kByte));  // each panel (depth / 4, MR, 4)
    auto* a = packed.mutable_data_ptr<uint8_t>();
    at::parallel_for(0, panels, 4, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; ++p) pack4(x, m, k, p * MR, 0, depth32, MR, 0x80, a + p * stride);
    });
    at::parallel_for(0, whole, 1, [&](int64_t j0, int64_t j1) {
      std::vector<int32_t> c(panels * MR * NR);
      alignas(64) uint8_t b[KC * NR];
      __m256i off[VECTORS];
      for (int64_t j = j0 * NR; j < j1 * NR; j += NR) {
        for (int64_t k0 = 0; k0 < depth32; k0 += KC) {
          const int64_t depth = std::min(KC, depth32 - k0);
          for (int64_t half = 0; half < NR; half += 8) pack4(w, n, k, j + half, k0, depth, NR, 0, b + half * 4);
          excess(b, depth, off);
          for (int64_t p = 0; p < panels; ++p) tile4(a + p * stride + k0 * MR, b, off, depth, c.data() + p * MR * NR, k0 > 0);
        }
        scaled(c.data(), m, j, n, scales, y);
      }
    });
    return out;
  }
#endif
  const int64_t depth16 = (k + 15) / 16 * 16, stride = MR * depth16 + 16;
  Tensor packed = at::empty({panels * stride}, q.options().dtype(at::kShort));  // each panel (depth / 2, MR, 2)
  auto* a = packed.mutable_data_ptr<int16_t>();
  at::parallel_for(0, panels, 4, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) pack(x, m, k, p * MR, 0, depth16, MR, a + p * stride);
  });
  at::parallel_for(0, whole, 1, [&](int64_t j0, int64_t j1) {
    std::vector<int32_t> c(panels * MR * NR);
    alignas(64) int16_t b[KC * NR];
    for (int64_t j = j0 * NR; j < j1 * NR; j += NR) {
      for (int64_t k0 = 0; k0 < depth16; k0 += KC) {
        const int64_t depth = std::min(KC, depth16 - k0);
        for (int64_t half = 0; half < NR; half += 8) pack(w, n, k, j + half, k0, depth, NR, b + half * 2);
        for (int64_t p = 0; p < panels; ++p) tile(a + p * stride + k0 * MR, b, depth, c.data() + p * MR * NR, k0 > 0);
      }
      scaled(c.data(), m, j, n, scales, y);
    }
  });
  return out;
}

// product (m, n) int32 of another kernel, scaled: float32.
Tensor scale_product(const Tensor& product, const Tensor& row_scale, const Tensor& channel_scale, const optional<Tensor>& bias) {
  const int64_t m = product.size(0), n = product.size(1);
  TORCH_CHECK(product.is_contiguous() && product.scalar_type() == at::kInt, "product: contiguous int32 (rows, channels)");
  TORCH_CHECK(row_scale.is_contiguous() && row_scale.numel() == m && channel_scale.is_contiguous() && channel_scale.numel() == n,
              "a scale for each row and each channel");
  Tensor out = at::empty({m, n}, product.options().dtype(at::kFloat));
  const auto* from = product.const_data_ptr<int32_t>();
  const auto *rows = row_scale.const_data_ptr<float>(), *channels = channel_scale.const_data_ptr<float>();
  const auto* added = bias ? bias->const_data_ptr<float>() : nullptr;
  auto* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, m, std::max<int64_t>(1, 16384 / std::max<int64_t>(n, 1)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) scale_row(from + r * n, channels, rows[r], added, n, to + r * n);
  });
  return out;
}

}  // namespace
