// Small parts in float32, and what all of the kernels share.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "avx512.h"

namespace {

using at::Tensor;
using std::optional;

constexpr int FEW = 4;  // rows whose products read every weight once and keep nothing packed
constexpr float SMALLEST = 1e-9f;  // scale of a row of zeros, times 127

float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The first `count` of `eight`, zeros behind them.
__m256 first_of(__m256 eight, int64_t count) {
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(eight, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), places)));
}

// e^x to about two units in the last place, for x below 88: 2^n e^r with |r| <= ln 2 / 2 (the polynomial of Cephes' expf).
__m256 exponential(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);  // in this order NaN stays NaN
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

}  // namespace
