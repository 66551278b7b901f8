// Float32 times integers of 2 to 8 bits in groups.
#pragma once
#include "floats.h"

namespace {

// The 8 integers q of BITS bits that begin at a byte, as float32 q - 2^(BITS - 1). Reads 8 bytes (BEHIND) from there on.
constexpr int64_t BEHIND = 8;

template <int BITS>
struct Eight {
  static constexpr int up = 32 - BITS;
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i shifts = BITS <= 4 ? _mm256_setr_epi32(up, up - BITS, up - 2 * BITS, up - 3 * BITS, up - 4 * BITS, up - 5 * BITS, up - 6 * BITS, up - 7 * BITS)
                                   : _mm256_setr_epi32(up, up - BITS, up - 2 * BITS, up - 3 * BITS, up, up - BITS, up - 2 * BITS, up - 3 * BITS);
  __m256 operator()(const uint8_t* p) const {
    if constexpr (BITS == 8) {
      const __m128i flipped = _mm_xor_si128(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(flipped));
    } else {
      __m256i words;
      if constexpr (BITS <= 4) {
        int32_t v;
        std::memcpy(&v, p, sizeof v);
        words = _mm256_set1_epi32(v);
      } else {
        uint64_t v;
        std::memcpy(&v, p, sizeof v);
        const __m128i low = _mm_set1_epi32(static_cast<int32_t>(v)), high = _mm_set1_epi32(static_cast<int32_t>(v >> (4 * BITS)));
        words = _mm256_set_m128i(high, low);
      }
      // each to the top of its word, its highest bit flipped: a number with a sign
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_xor_si256(_mm256_sllv_epi32(words, shifts), sign), up));
    }
  }
};

struct Grouped {
  const uint8_t* packed;
  const uint16_t *scale, *minimum;  // fp16; either a minimum or
  const uint8_t* zero;              // a zero point
  int64_t rows, width, bytes, groups, size;
  float half;  // what Eight leaves out

  // The integers of a row; those of the last one in `copy`, since behind them nothing may be read.
  const uint8_t* row(int64_t j, std::vector<uint8_t>& copy) const {
    if (j < rows - 1 && bytes >= BEHIND) return packed + j * bytes;
    copy.assign(bytes + BEHIND, 0);
    std::memcpy(copy.data(), packed + j * bytes, bytes);
    return copy.data();
  }
};

// What the weights of a row are made of its integers by, eight groups at a time: weight = step * (q - half) + offset.
struct Steps {
  int64_t padded;  // groups, filled up to whole eights; behind them eight more may be read
  std::vector<float> step, offset;
  explicit Steps(const Grouped& g) : padded((g.groups + 7) / 8 * 8), step(padded + 8), offset(padded) {}

  // What is behind the last group of a row is another row's: it meets sums of 0.
  void read(const Grouped& g, int64_t row) {
    const __m256 half = _mm256_set1_ps(g.half);
    for (int64_t group = 0; group < g.groups; group += 8) {
      const int64_t at = row * g.groups + group, left = g.rows * g.groups - at;
      const __m256 scale = _mm256_cvtph_ps(eight_of(g.scale + at, left));
      _mm256_storeu_ps(step.data() + group, scale);
      __m256 beside;
      if (g.minimum) {
        beside = _mm256_fmadd_ps(half, scale, _mm256_cvtph_ps(eight_of(g.minimum + at, left)));
      } else {
        uint64_t zeros = 0;
        if (left >= 8)
          std::memcpy(&zeros, g.zero + at, sizeof zeros);
        else
          std::memcpy(&zeros, g.zero + at, left);
        const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(zeros))));
        beside = _mm256_mul_ps(_mm256_sub_ps(half, zero), scale);
      }
      _mm256_storeu_ps(offset.data() + group, beside);
    }
  }

 private:
  static __m128i eight_of(const uint16_t* from, int64_t left) {
    if (left >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    alignas(16) uint16_t some[8] = {};
    std::memcpy(some, from, left * sizeof(uint16_t));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(some));
  }
};

// x (ROWS, stride) float32 with zeros behind the width, `sums` (ROWS, groups, filled up to whole eights) of it: the channels from n0 to n1 of
// out (ROWS, rows).
template <int BITS, int ROWS>
void few_rows_grouped(const Grouped& g, const float* x, int64_t stride, const float* sums, float* out, int64_t n0, int64_t n1) {
  constexpr int CHAINS = ROWS == 1 ? 4 : 2;  // sums that do not wait for each other
  const Eight<BITS> eight;
  std::vector<uint8_t> copy;
  Steps steps(g);
  const int64_t padded = steps.padded;
  for (int64_t j = n0; j < n1; ++j) {
    const uint8_t* row = g.row(j, copy);
    steps.read(g, j);
    __m256 total[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      total[r] = _mm256_setzero_ps();
      for (int64_t group = 0; group < padded; group += 8)
        total[r] = _mm256_fmadd_ps(_mm256_loadu_ps(steps.offset.data() + group), _mm256_loadu_ps(sums + r * padded + group), total[r]);
    }
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t first = group * g.size, last = std::min(first + g.size, g.width);
      __m256 acc[ROWS][CHAINS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) acc[r][c] = _mm256_setzero_ps();
      const uint8_t* p = row + first / 8 * BITS;
      int64_t i = first;
      for (; i + 8 * CHAINS <= last; i += 8 * CHAINS, p += CHAINS * BITS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) {
          const __m256 a = eight(p + c * BITS);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) acc[r][c] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + r * stride + i + 8 * c), acc[r][c]);
        }
      for (; i < last; i += 8, p += BITS) {
        const __m256 all = eight(p), a = i + 8 <= last ? all : first_of(all, last - i);
        for (int r = 0; r < ROWS; ++r) acc[r][0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + r * stride + i), acc[r][0]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; ++c) acc[r][0] = _mm256_add_ps(acc[r][0], acc[r][c]);
      const __m256 step = _mm256_set1_ps(steps.step[group]);
      for (int r = 0; r < ROWS; ++r) total[r] = _mm256_fmadd_ps(acc[r][0], step, total[r]);
    }
    for (int r = 0; r < ROWS; ++r) out[r * g.rows + j] = sum_of(total[r]);
  }
}

// Rows of x (m, width) as whole numbers of `unit` (m), 24 bits in three digits, the highest first: `of` (m, 3, stride) int8, zeros behind the width. Beside
// the largest of its row float32 says no more of a number.
struct Digits {
  int64_t stride;
  std::vector<int8_t> bytes;
  int8_t* of;  // in `bytes`, where a line of the cache begins
  std::vector<float> unit;

  Digits(const Digits&) = delete;
  AVX512 Digits(const float* x, int64_t m, int64_t width) : stride((width + 63) / 64 * 64), bytes(m * 3 * stride + 63), unit(m) {
    of = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
    for (int64_t r = 0; r < m; ++r, x += width) {
      __m512 most = _mm512_setzero_ps();
      __mmask16 wrong = 0;
      for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first16(width - i), x + i);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        wrong |= _mm512_fpclass_ps_mask(v, 0x99);  // NaN, infinite
      }
      const float largest = _mm512_reduce_max_ps(most) / ((1 << 23) - (1 << 16));  // the highest digit is no more than 127
      unit[r] = wrong ? std::numeric_limits<float>::quiet_NaN() : largest;  // as every product will be
      if (unit[r] < std::numeric_limits<float>::min()) unit[r] = 0;
      if (!(unit[r] > 0)) continue;
      const __m512 inverse = _mm512_set1_ps(1.0f / unit[r]);
      for (int64_t i = 0; i < width; i += 16) {
        __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first16(width - i), x + i), inverse));
        for (int digit = 2; digit >= 0; --digit) {
          const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(of + (r * 3 + digit) * stride + i), _mm512_cvtepi32_epi8(low));
          left = _mm512_srai_epi32(_mm512_sub_epi32(left, low), 8);
        }
      }
    }
  }
};

// Where each of eight numbers of BITS bits is in the bytes of 64 of them: the eight bytes from where the eight begin, and the bit there.
template <int BITS>
struct Places {
  alignas(64) uint8_t byte[64] = {}, bit[64] = {};
  constexpr Places() {
    for (int i = 0; i < 64; ++i) byte[i] = static_cast<uint8_t>((i / 8 * BITS + i % 8) % 64), bit[i] = static_cast<uint8_t>(i % 8 * BITS);
  }
};

// As `few_rows_grouped`, of inputs in digits; groups of 8, 16, 32, or of a multiple of 64, or one.
template <int BITS, int ROWS>
AVX512 void few_rows_digits(const Grouped& g, const Digits& x, const float* sums, float* out, int64_t n0, int64_t n1) {
  static constexpr Places<BITS> places;
  const __m512i byte = _mm512_load_si512(places.byte), bit = _mm512_load_si512(places.bit), all = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  const int64_t size = g.groups == 1 ? std::numeric_limits<int64_t>::max() : g.size, at_once = size < 64 ? 64 / size : 1;
  alignas(64) int32_t group_of[16];
  for (int lane = 0; lane < 16; ++lane) group_of[lane] = static_cast<int32_t>(lane * at_once / 16);
  const __m512i order = _mm512_load_si512(group_of);
  const __mmask64 whole = first64(8 * BITS);
  Steps steps(g);
  const int64_t padded = steps.padded;
  for (int64_t j = n0; j < n1; ++j) {
    steps.read(g, j);
    const uint8_t* row = g.packed + j * g.bytes;
    __m256 beside[ROWS];
    __m512 total[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      beside[r] = _mm256_setzero_ps(), total[r] = _mm512_setzero_ps();
      for (int64_t group = 0; group < padded; group += 8) {  // the integers have no sign here
        const __m256 step = _mm256_loadu_ps(steps.step.data() + group), offset = _mm256_loadu_ps(steps.offset.data() + group);
        beside[r] = _mm256_fmadd_ps(_mm256_fnmadd_ps(_mm256_set1_ps(g.half), step, offset), _mm256_loadu_ps(sums + r * padded + group), beside[r]);
      }
    }
    int64_t group = 0, end = size;
    for (int64_t i = 0, at = 0; i < g.width; i += 64, at += 8 * BITS) {
      __m512i q = _mm512_maskz_loadu_epi8(at + 8 * BITS <= g.bytes ? whole : first64(g.bytes - at), row + at);
      if constexpr (BITS < 8) q = _mm512_and_si512(_mm512_multishift_epi64_epi8(bit, _mm512_permutexvar_epi8(byte, q)), all);
      const float* from = steps.step.data() + group;
      const __m512 step = at_once == 1 ? _mm512_set1_ps(*from) : _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(from)));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const int8_t* digits = x.of + 3 * r * x.stride + i;
        __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_loadu_si512(digits));
        high = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), q, _mm512_loadu_si512(digits + x.stride));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_loadu_si512(digits + 2 * x.stride)));
        total[r] = _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), low), step, total[r]);
      }
      if (at_once > 1) {
        group += at_once;
      } else if (i + 64 == end) {
        ++group, end += size;
      }
    }
    for (int r = 0; r < ROWS; ++r) out[r * g.rows + j] = _mm512_reduce_add_ps(total[r]) * x.unit[r] + sum_of(beside[r]);
  }
}

template <int BITS>
void dequantize_rows(const Grouped& g, float* out, int64_t first_row, int64_t last_row) {
  const Eight<BITS> eight;
  std::vector<uint8_t> copy;
  for (int64_t j = first_row; j < last_row; ++j) {
    const uint8_t* row = g.row(j, copy);
    float* to = out + j * g.width;
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t first = group * g.size, last = std::min(first + g.size, g.width), at = j * g.groups + group;
      const float step = _cvtsh_ss(g.scale[at]);
      const __m256 scale = _mm256_set1_ps(step), half = _mm256_set1_ps(g.half);
      const __m256 zero = _mm256_set1_ps(g.minimum ? _cvtsh_ss(g.minimum[at]) : g.zero[at] - g.half);
      const auto weights = [&](__m256 q) {
        return g.minimum ? _mm256_fmadd_ps(_mm256_add_ps(q, half), scale, zero) : _mm256_mul_ps(_mm256_sub_ps(q, zero), scale);
      };
      const uint8_t* p = row + first / 8 * BITS;
      int64_t i = first;
      for (; i + 8 <= last; i += 8, p += BITS) _mm256_storeu_ps(to + i, weights(eight(p)));
      if (i < last) {
        float rest[8];
        _mm256_storeu_ps(rest, weights(eight(p)));
        std::memcpy(to + i, rest, (last - i) * sizeof(float));
      }
    }
  }
}

Grouped grouped(const Tensor& packed, const Tensor& scale, const Tensor& zero, int64_t bits, int64_t size, int64_t width) {
  Grouped g{};
  g.half = static_cast<float>(1 << (bits - 1));
  g.rows = packed.size(0), g.width = width, g.bytes = packed.size(1) * 4, g.groups = scale.size(1), g.size = size;
  const bool fits = packed.is_contiguous() && packed.scalar_type() == at::kInt && scale.is_contiguous() && scale.scalar_type() == at::kHalf &&
                    zero.is_contiguous() && zero.sizes() == scale.sizes() && scale.size(0) == g.rows && g.bytes * 8 >= width * bits &&
                    (g.groups - 1) * size < width && g.groups * size >= width && (g.groups == 1 || size % 8 == 0);
  TORCH_CHECK(fits, "not a weight of ", g.rows, " x ", width, " in integers of ", bits, " bits in groups of ", size);
  g.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  g.scale = static_cast<const uint16_t*>(scale.const_data_ptr());
  if (zero.scalar_type() == at::kHalf) {
    g.minimum = static_cast<const uint16_t*>(zero.const_data_ptr());
  } else {
    g.zero = zero.const_data_ptr<uint8_t>();
  }
  return g;
}

// Calls f with a std::integral_constant of the number of bits.
template <class F>
void with_bits(int64_t bits, F f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 8: return f(std::integral_constant<int, 8>{});
  }
  TORCH_CHECK(false, "integers of ", bits, " bits");
}

Tensor grouped_dequantize(const Tensor& packed, const Tensor& scale, const Tensor& zero, int64_t bits, int64_t size, int64_t width) {
  const Grouped g = grouped(packed, scale, zero, bits, size, width);
  Tensor out = at::empty({g.rows, width}, scale.options().dtype(at::kFloat));
  auto* to = out.mutable_data_ptr<float>();
  with_bits(bits, [&](auto b) {
    at::parallel_for(0, g.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)),
                     [&](int64_t first, int64_t last) { dequantize_rows<b>(g, to, first, last); });
  });
  return out;
}

// out (m, rows) = x (m, width) times the weights^T, m from 1 to FEW.
void few_grouped(const Grouped& g, int64_t bits, const float* x, int64_t m, float* out) {
  const int64_t stride = (g.width + 7) / 8 * 8, groups = (g.groups + 7) / 8 * 8;
  std::vector<float> padded(m * stride, 0.0f), sums(m * groups, 0.0f);
  for (int64_t r = 0; r < m; ++r) {
    std::memcpy(padded.data() + r * stride, x + r * g.width, g.width * sizeof(float));
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t first = group * g.size, last = std::min(first + g.size, g.width);
      float sum = 0;
      for (int64_t i = first; i < last; ++i) sum += padded[r * stride + i];
      sums[r * groups + group] = sum;
    }
  }
  const bool in_digits = has_avx512() && (g.groups == 1 || g.size == 8 || g.size == 16 || g.size == 32 || g.size % 64 == 0);
  const int64_t at_once = std::max<int64_t>(16, 32768 / g.width);
  const optional<Digits> digits = in_digits ? optional<Digits>(std::in_place, x, m, g.width) : std::nullopt;
  with_bits(bits, [&](auto b) {
    if (in_digits) {
      const auto run = m == 1 ? few_rows_digits<b, 1> : m == 2 ? few_rows_digits<b, 2> : m == 3 ? few_rows_digits<b, 3> : few_rows_digits<b, 4>;
      at::parallel_for(0, g.rows, at_once, [&](int64_t n0, int64_t n1) { run(g, *digits, sums.data(), out, n0, n1); });
    } else {
      const auto run = m == 1 ? few_rows_grouped<b, 1> : m == 2 ? few_rows_grouped<b, 2> : m == 3 ? few_rows_grouped<b, 3> : few_rows_grouped<b, 4>;
      at::parallel_for(0, g.rows, at_once, [&](int64_t n0, int64_t n1) { run(g, padded.data(), stride, sums.data(), out, n0, n1); });
    }
  });
}

Tensor grouped_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& zero, int64_t bits, int64_t size) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat && 1 <= x.size(0) && x.size(0) <= FEW,
              "x: contiguous float32 (1 to ", FEW, ", in)");
  const Grouped g = grouped(packed, scale, zero, bits, size, x.size(1));
  Tensor out = at::empty({x.size(0), g.rows}, x.options());
  few_grouped(g, bits, x.const_data_ptr<float>(), x.size(0), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
