// Products of quantized linears on x86 CPUs with AVX2 and FMA: what __init__.py beside this file builds, loads and describes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <cpuid.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

constexpr int FEW = 4;  // rows whose products read every weight once and keep nothing packed
constexpr float SMALLEST = 1e-9f;  // scale of a row of zeros, times 127

// ------------------------------------------------------------------------------------------------------------------ small parts
float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// e^x to about two units in the last place, for x below 88: 2^n e^r with |r| <= ln 2 / 2 (the polynomial of Cephes' expf).
__m256 exponential(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 y = _mm256_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
  y = _mm256_add_ps(_mm256_fmadd_ps(y, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

float dot(const float* a, const float* b, int64_t count) {
  __m256 acc[4];
  for (auto& each : acc) each = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int p = 0; p < 4; ++p) acc[p] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * p), _mm256_loadu_ps(b + i + 8 * p), acc[p]);
  for (; i + 8 <= count; i += 8) acc[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), acc[0]);
  float sum = sum_of(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// The same of bf16, the upper halves of float32.
float dot(const uint16_t* a, const float* b, int64_t count) {
  const auto eight = [&](int64_t at) {
    const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16));
  };
  __m256 acc[4];
  for (auto& each : acc) each = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int p = 0; p < 4; ++p) acc[p] = _mm256_fmadd_ps(eight(i + 8 * p), _mm256_loadu_ps(b + i + 8 * p), acc[p]);
  for (; i + 8 <= count; i += 8) acc[0] = _mm256_fmadd_ps(eight(i), _mm256_loadu_ps(b + i), acc[0]);
  float sum = sum_of(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(a[i]) << 16;
    float weight;
    std::memcpy(&weight, &bits, sizeof weight);
    sum += weight * b[i];
  }
  return sum;
}

// out (m, rows) = x (m, width) times weights^T, float32 or bf16.
void few_floats(const Tensor& weight, const float* x, int64_t m, float* out) {
  const int64_t rows = weight.size(0), width = weight.size(1);
  const auto run = [&](const auto* w) {
    at::parallel_for(0, rows, std::max<int64_t>(16, 32768 / std::max<int64_t>(width, 1)), [&](int64_t n0, int64_t n1) {
      for (int64_t j = n0; j < n1; ++j)
        for (int64_t r = 0; r < m; ++r) out[r * rows + j] = dot(w + j * width, x + r * width, width);
    });
  };
  if (weight.scalar_type() == at::kBFloat16) {
    run(static_cast<const uint16_t*>(weight.const_data_ptr()));
  } else {
    run(weight.const_data_ptr<float>());
  }
}

Tensor bfloat16_linear(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == at::kBFloat16, "weight: contiguous bf16 (out, in)");
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat && 1 <= x.size(0) && x.size(0) <= FEW && x.size(1) == weight.size(1),
              "x: contiguous float32 (1 to ", FEW, ", in)");
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  few_floats(weight, x.const_data_ptr<float>(), x.size(0), out.mutable_data_ptr<float>());
  return out;
}

void rms_norm(const float* x, const float* weight, int64_t width, double eps, float* y) {
  const float factor = 1.0f / std::sqrt(dot(x, x, width) / static_cast<float>(width) + static_cast<float>(eps));
  for (int64_t i = 0; i < width; ++i) y[i] = x[i] * factor * weight[i];
}

// y (width) = SiLU(gate) * up.
void gated(const float* gate, const float* up, int64_t width, float* y) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    const __m256 below = _mm256_add_ps(_mm256_set1_ps(1.0f), exponential(_mm256_min_ps(_mm256_sub_ps(_mm256_setzero_ps(), g), _mm256_set1_ps(87.0f))));
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_loadu_ps(up + i)));
  }
  for (; i < width; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// x times the Hadamard matrix of Sylvester of 8 rows, whose three steps each exchange lanes and turn the sign of half of them.
__m256 hadamard8(__m256 x) {
  const float n = -0.0f;
  const __m256 ones = _mm256_setr_ps(0, n, 0, n, 0, n, 0, n), twos = _mm256_setr_ps(0, 0, n, n, 0, 0, n, n), fours = _mm256_setr_ps(0, 0, 0, 0, n, n, n, n);
  x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1), _mm256_xor_ps(x, ones));
  x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e), _mm256_xor_ps(x, twos));
  return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, fours));
}

// Every `size` of x (width) multiplied, in place, by the Hadamard matrix of Sylvester / sqrt(size).
void rotate(float* x, int64_t width, int64_t size) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(size));
  int64_t half = 1;
  if (size >= 8) {
    for (int64_t i = 0; i < width; i += 8) _mm256_storeu_ps(x + i, hadamard8(_mm256_loadu_ps(x + i)));
    half = 8;
  }
  for (; half < size; half *= 2)
    for (int64_t i = 0; i < width; i += 2 * half)
      for (int64_t j = i; j < i + half; ++j) {
        const float left = x[j], right = x[j + half];
        x[j] = left + right;
        x[j + half] = left - right;
      }
  for (int64_t i = 0; i < width; ++i) x[i] *= norm;
}

// -------------------------------------------------------------------------------------------------------- activations to int8
// x (width) -> q, int8 or wider, and the scale: max(|x|, SMALLEST) / 127, halves to even; `fixed`: the scale there is, not positive: none.
template <class Q>
float quantize_row(const float* x, int64_t width, float fixed, Q* q) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  float top = *std::max_element(lanes, lanes + 8);
  bool nan = _mm256_movemask_ps(unordered) != 0;
  for (; i < width; ++i) {
    top = std::max(top, std::fabs(x[i]));
    nan = nan || std::isnan(x[i]);
  }
  if (nan) top = std::numeric_limits<float>::quiet_NaN();  // as every product of the row will be
  const float step = nan ? top : fixed > 0 ? fixed : (top < SMALLEST ? SMALLEST : top) / 127.0f, inverse = 1.0f / step;
  const __m256 factor = _mm256_set1_ps(inverse), low = _mm256_set1_ps(-127.0f), high = _mm256_set1_ps(127.0f);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto eight = [&](int64_t at) {
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(_mm256_mul_ps(_mm256_loadu_ps(x + at), factor), high), low));
  };
  for (i = 0; i + 32 <= width; i += 32) {
    const __m256i first = _mm256_packs_epi32(eight(i), eight(i + 8)), second = _mm256_packs_epi32(eight(i + 16), eight(i + 24));
    if constexpr (sizeof(Q) == 1) {
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), bytes);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permute4x64_epi64(first, 0xd8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i + 16), _mm256_permute4x64_epi64(second, 0xd8));
    }
  }
  for (; i < width; ++i) q[i] = static_cast<Q>(_mm_cvtss_si32(_mm_set_ss(std::max(std::min(x[i] * inverse, 127.0f), -127.0f))));
  return step;
}

// x (rows, width) float32 -> int8 and the scale of each row. With a `norm` RMSNorm first; `gate`: x is (rows, 2 width), and SiLU of the first
// half times the second is taken; then, with a `rotation`, every so many channels are rotated.
std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, const optional<Tensor>& norm, double eps, bool gate, int64_t rotation) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat, "x: contiguous float32 (rows, width)");
  const int64_t rows = x.size(0), given = x.size(1), width = gate ? given / 2 : given;
  TORCH_CHECK(!norm || (norm->is_contiguous() && norm->scalar_type() == at::kFloat && norm->numel() == width), "norm: contiguous float32 (width,)");
  TORCH_CHECK(rotation == 0 || (width % rotation == 0 && (rotation & (rotation - 1)) == 0), "a rotation of ", rotation, " of ", width, " channels");
  Tensor q = at::empty({rows, width}, x.options().dtype(at::kChar)), scale = at::empty({rows, 1}, x.options());
  const auto* from = x.const_data_ptr<float>();
  const auto* weight = norm ? norm->const_data_ptr<float>() : nullptr;
  auto* to = q.mutable_data_ptr<int8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), [&](int64_t first, int64_t last) {
    std::vector<float> row(width);
    for (int64_t r = first; r < last; ++r) {
      const float* read = from + r * given;
      if (weight || gate || rotation) {
        if (weight) {
          rms_norm(read, weight, width, eps, row.data());
        } else if (gate) {
          gated(read, read + width, width, row.data());
        } else {
          std::memcpy(row.data(), read, width * sizeof(float));
        }
        if (rotation) rotate(row.data(), width, rotation);
        read = row.data();
      }
      scales[r] = quantize_row(read, width, 0.0f, to + r * width);
    }
  });
  return {q, scale};
}

// ----------------------------------------------------------------------------------------------- int8 times int8, exact in int32
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
    const int64_t stride = (k + 31) / 32 * 32;
    std::vector<int16_t> wide(m * stride, 0);
    for (int64_t r = 0; r < m; ++r) std::copy(x + r * k, x + (r + 1) * k, wide.begin() + r * stride);
    const auto run = m <= 1 ? few_rows<1> : m == 2 ? few_rows<2> : m == 3 ? few_rows<3> : few_rows<4>;
    if (m > 0)
      at::parallel_for(0, n, std::max<int64_t>(16, 65536 / std::max<int64_t>(k, 1)),
                       [&](int64_t n0, int64_t n1) { run(wide.data(), stride, w, k, n0, n1, scales, y, n); });
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
    for (int64_t r = first; r < last; ++r) {
      const int32_t* sums = from + r * n;
      float* y = to + r * n;
      for (int64_t j = 0; j < n; ++j) {
        const float scaled = static_cast<float>(sums[j]) * channels[j] * rows[r];
        y[j] = added ? scaled + added[j] : scaled;
      }
    }
  });
  return out;
}

// ------------------------------------------------------------------------------------------- integers of 2 to 8 bits in groups
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

// The first `count` of `eight`, zeros behind them.
__m256 first_of(__m256 eight, int64_t count) {
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(eight, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), places)));
}

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
  std::vector<float> step, offset;
  explicit Steps(const Grouped& g) : step((g.groups + 7) / 8 * 8), offset(step.size()) {}

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
  const auto padded = static_cast<int64_t>(steps.step.size());
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
  with_bits(bits, [&](auto b) {
    const auto run = m == 1 ? few_rows_grouped<b, 1> : m == 2 ? few_rows_grouped<b, 2> : m == 3 ? few_rows_grouped<b, 3> : few_rows_grouped<b, 4>;
    at::parallel_for(0, g.rows, std::max<int64_t>(16, 32768 / g.width),
                     [&](int64_t n0, int64_t n1) { run(g, padded.data(), stride, sums.data(), out, n0, n1); });
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

// -------------------------------------------------------------------------------------------------- 4 bits with 16 levels of any kind
// x (1 to FEW, width) float32 times weights (rows, width)^T that are 16 `levels` times a scale for every 64 of a row, as bitsandbytes packs
// them: two to a byte, the first in the upper half.
constexpr int64_t LEVEL_BLOCK = 64;

struct Levels {
  const uint8_t* packed;
  const float *scale, *levels;
  int64_t rows, width;
};

template <int ROWS>
void few_rows_levels(const Levels& w, const float* x, float* out, int64_t n0, int64_t n1) {
  const __m256 low = _mm256_loadu_ps(w.levels), high = _mm256_loadu_ps(w.levels + 8);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  const int64_t blocks = w.width / LEVEL_BLOCK;
  for (int64_t j = n0; j < n1; ++j) {
    __m256 total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm256_setzero_ps();
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t* p = w.packed + (j * w.width + block * LEVEL_BLOCK) / 2;
      __m256 acc[ROWS][2];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
#pragma GCC unroll 8
      for (int c = 0; c < LEVEL_BLOCK / 8; ++c) {
        int32_t v;
        std::memcpy(&v, p + 4 * c, sizeof v);
        const __m256i number = _mm256_srlv_epi32(_mm256_set1_epi32(v), shifts);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(number, 28));  // its sign is the fourth bit
        const __m256 q = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, number), _mm256_permutevar8x32_ps(high, number), upper);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          acc[r][c % 2] = _mm256_fmadd_ps(q, _mm256_loadu_ps(x + r * w.width + block * LEVEL_BLOCK + 8 * c), acc[r][c % 2]);
      }
      const __m256 scale = _mm256_set1_ps(w.scale[j * blocks + block]);
      for (int r = 0; r < ROWS; ++r) total[r] = _mm256_fmadd_ps(_mm256_add_ps(acc[r][0], acc[r][1]), scale, total[r]);
    }
    for (int r = 0; r < ROWS; ++r) out[r * w.rows + j] = sum_of(total[r]);
  }
}

// `x` has `given` columns of the `width` that the weights have: behind them rows are filled up with zeros.
void few_levels(const Levels& w, const float* x, int64_t m, int64_t given, float* out) {
  std::vector<float> filled(m * w.width, 0.0f);
  for (int64_t r = 0; r < m; ++r) std::memcpy(filled.data() + r * w.width, x + r * given, given * sizeof(float));
  const auto run = m == 1 ? few_rows_levels<1> : m == 2 ? few_rows_levels<2> : m == 3 ? few_rows_levels<3> : few_rows_levels<4>;
  at::parallel_for(0, w.rows, std::max<int64_t>(16, 32768 / w.width), [&](int64_t n0, int64_t n1) { run(w, filled.data(), out, n0, n1); });
}

Levels levels_of(const Tensor& packed, const Tensor& scale, const Tensor& levels) {
  const int64_t rows = scale.size(0), width = scale.size(1) * LEVEL_BLOCK;
  TORCH_CHECK(scale.dim() == 2 && scale.is_contiguous() && scale.scalar_type() == at::kFloat && packed.is_contiguous() &&
                  packed.scalar_type() == at::kByte && packed.numel() * 2 == rows * width && levels.numel() == 16 && levels.is_contiguous(),
              "packed: uint8, two weights each; scale: float32 (rows, blocks of ", LEVEL_BLOCK, "); levels: 16");
  return {packed.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(), levels.const_data_ptr<float>(), rows, width};
}

Tensor levels_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& levels) {
  const Levels w = levels_of(packed, scale, levels);
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat && 1 <= x.size(0) && x.size(0) <= FEW && x.size(1) <= w.width,
              "x: contiguous float32 (1 to ", FEW, ", in)");
  Tensor out = at::empty({x.size(0), w.rows}, x.options());
  few_levels(w, x.const_data_ptr<float>(), x.size(0), x.size(1), out.mutable_data_ptr<float>());
  return out;
}

// ------------------------------------------------------------------------------------------------------- one token of a Llama
enum Kind : int64_t { FLOAT, INT8, GROUPED, LEVELS };

// y (out) = W x: W as `kind` says, from three tensors and two numbers, see `decode`.
struct Linear {
  Kind kind;
  Tensor a, b, c;
  int64_t first, second;

  int64_t out() const { return kind == LEVELS ? b.size(0) : a.size(0); }
  void operator()(const float* x, int64_t width, float* y) const {
    if (kind == FLOAT) {
      few_floats(a, x, 1, y);
    } else if (kind == INT8) {
      int8(x, width, y);
    } else if (kind == LEVELS) {
      few_levels(levels_of(a, b, c), x, 1, width, y);
    } else {
      grouped_product(x, width, y);
    }
  }

  void int8(const float* x, int64_t width, float* y) const {
    std::vector<float> turned;
    if (first) {
      turned.assign(x, x + width);
      rotate(turned.data(), width, first);
      x = turned.data();
    }
    const int64_t stride = (width + 31) / 32 * 32;
    std::vector<int16_t> wide(stride, 0);
    const float step = quantize_row(x, width, c.numel() ? *c.const_data_ptr<float>() : 0.0f, wide.data());
    const Scales scales{&step, b.const_data_ptr<float>(), nullptr};
    at::parallel_for(0, out(), std::max<int64_t>(16, 65536 / width), [&](int64_t n0, int64_t n1) {
      few_rows<1>(wide.data(), stride, a.const_data_ptr<int8_t>(), width, n0, n1, scales, y, out());
    });
  }

  void grouped_product(const float* x, int64_t width, float* y) const {
    const Grouped g = grouped(a, b, c, first, second, width);
    few_grouped(g, first, x, 1, y);
  }
};

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

// What one query reads of keys and values (tokens, size), rows `apart` from each other: out (size).
void attend(const float* query, const float* keys, const float* values, int64_t apart_keys, int64_t apart_values, int64_t tokens, int64_t size,
            float scaling, float* out) {
  const int64_t padded = (tokens + 7) / 8 * 8;
  std::vector<float> weight(padded, -std::numeric_limits<float>::infinity());
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < tokens; ++t) {
    weight[t] = dot(query, keys + t * apart_keys, size) * scaling;
    top = std::max(top, weight[t]);
  }
  __m256 sum = _mm256_setzero_ps();
  for (int64_t t = 0; t < padded; t += 8) {
    __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(weight.data() + t), _mm256_set1_ps(top)));
    e = first_of(e, tokens - t);
    _mm256_storeu_ps(weight.data() + t, e);
    sum = _mm256_add_ps(sum, e);
  }
  const float all = sum_of(sum);
  std::fill(out, out + size, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const float share = weight[t] / all;
    const float* value = values + t * apart_values;
    for (int64_t i = 0; i < size; ++i) out[i] += share * value[i];
  }
}

// All blocks of a Llama for one token of one text, `hidden` (channels,) float32.
// per block: `norms` 2 weights; `linears` q, k, v, o, gate, up, down, three tensors each: weight, float32 or bf16 (FLOAT); int8 weight, scale of its channels,
// scale of its input or nothing (INT8); integers, scales, zeros (GROUPED); packed, scales, levels (LEVELS); `kinds` three numbers each: the kind; size of the rotation of the
// input or 0 (INT8), bits and group (GROUPED). `keys`, `values` per block (1, heads, tokens, head_dim), with the place of the new one at the end.
Tensor decode(const Tensor& hidden, const Tensor& cos, const Tensor& sin, at::TensorList norms, at::TensorList linears, at::IntArrayRef kinds,
              at::TensorList keys, at::TensorList values, double eps, double scaling) {
  constexpr int64_t EACH = 7;
  const int64_t blocks = keys.size(), channels = hidden.numel(), size = keys[0].size(3), tokens = keys[0].size(2);
  TORCH_CHECK(static_cast<int64_t>(norms.size()) == 2 * blocks && static_cast<int64_t>(linears.size()) == 3 * EACH * blocks &&
                  static_cast<int64_t>(kinds.size()) == 3 * EACH * blocks && static_cast<int64_t>(values.size()) == blocks,
              "7 linears and 2 norms for each block");
  Tensor result = at::empty({channels}, hidden.options());
  auto* stream = result.mutable_data_ptr<float>();
  std::memcpy(stream, hidden.const_data_ptr<float>(), channels * sizeof(float));
  std::vector<float> normed(channels), query, key, value, attended, gate, up, added(channels);
  for (int64_t block = 0; block < blocks; ++block) {
    const auto linear = [&](int64_t number) {
      const int64_t at = 3 * (EACH * block + number);
      return Linear{static_cast<Kind>(kinds[at]), linears[at], linears[at + 1], linears[at + 2], kinds[at + 1], kinds[at + 2]};
    };
    const auto apply = [&](int64_t number, const std::vector<float>& x, std::vector<float>& y) {
      const Linear each = linear(number);
      y.resize(each.out());
      each(x.data(), static_cast<int64_t>(x.size()), y.data());
    };
    rms_norm(stream, norms[2 * block].const_data_ptr<float>(), channels, eps, normed.data());
    apply(0, normed, query);
    apply(1, normed, key);
    apply(2, normed, value);
    const Tensor &k = keys[block], &v = values[block];
    const int64_t heads = static_cast<int64_t>(query.size()) / size, key_heads = k.size(1);
    const auto *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    turn(query.data(), heads, size, c, s);
    turn(key.data(), key_heads, size, c, s);
    TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1 && k.size(2) == tokens && static_cast<int64_t>(key.size()) == key_heads * size);
    auto *all_keys = k.mutable_data_ptr<float>(), *all_values = v.mutable_data_ptr<float>();
    for (int64_t head = 0; head < key_heads; ++head) {
      std::memcpy(all_keys + head * k.stride(1) + (tokens - 1) * k.stride(2), key.data() + head * size, size * sizeof(float));
      std::memcpy(all_values + head * v.stride(1) + (tokens - 1) * v.stride(2), value.data() + head * size, size * sizeof(float));
    }
    attended.resize(query.size());
    at::parallel_for(0, heads, std::max<int64_t>(1, 8192 / (tokens * size)), [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; ++head) {
        const int64_t of = head / (heads / key_heads);
        attend(query.data() + head * size, all_keys + of * k.stride(1), all_values + of * v.stride(1), k.stride(2), v.stride(2), tokens, size,
               static_cast<float>(scaling), attended.data() + head * size);
      }
    });
    apply(3, attended, added);
    for (int64_t i = 0; i < channels; ++i) stream[i] += added[i];
    rms_norm(stream, norms[2 * block + 1].const_data_ptr<float>(), channels, eps, normed.data());
    apply(4, normed, gate);
    apply(5, normed, up);
    gated(gate.data(), up.data(), static_cast<int64_t>(gate.size()), gate.data());
    apply(6, gate, added);
    for (int64_t j = 0; j < channels; ++j) stream[j] += added[j];
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(compactmind, m) {
  m.def("quantize_rows(Tensor x, Tensor? norm, float eps, bool gate, int rotation) -> (Tensor, Tensor)");
  m.def("int8_linear(Tensor q, Tensor row_scale, Tensor weight, Tensor channel_scale, Tensor? bias, bool vnni=True) -> Tensor");
  m.def("scale_product(Tensor product, Tensor row_scale, Tensor channel_scale, Tensor? bias) -> Tensor");
  m.def("avx_vnni", &has_avx_vnni);
  m.def("grouped_dequantize(Tensor packed, Tensor scale, Tensor zero, int bits, int size, int width) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero, int bits, int size) -> Tensor");
  m.def("bfloat16_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("levels_linear(Tensor x, Tensor packed, Tensor scale, Tensor levels) -> Tensor");
  m.def("decode(Tensor hidden, Tensor cos, Tensor sin, Tensor[] norms, Tensor[] linears, int[] kinds, Tensor(a!)[] keys, Tensor(b!)[] values, "
        "float eps, float scaling) -> Tensor");
}

TORCH_LIBRARY_IMPL(compactmind, CPU, m) {
  m.impl("quantize_rows", &quantize_rows);
  m.impl("int8_linear", &int8_linear);
  m.impl("scale_product", &scale_product);
  m.impl("grouped_dequantize", &grouped_dequantize);
  m.impl("grouped_linear", &grouped_linear);
  m.impl("bfloat16_linear", &bfloat16_linear);
  m.impl("levels_linear", &levels_linear);
  m.impl("decode", &decode);
}
