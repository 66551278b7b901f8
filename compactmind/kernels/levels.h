// Float32 times 4 bits with 16 levels of any kind.
#pragma once
#include "floats.h"

namespace {

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

template <int ROWS>
AVX512 void few_rows_levels512(const Levels& w, const float* x, float* out, int64_t n0, int64_t n1) {
  const __m512 levels = _mm512_loadu_ps(w.levels);
  const __m128i places = _mm_setr_epi8(4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56);
  const int64_t blocks = w.width / LEVEL_BLOCK;
  for (int64_t j = n0; j < n1; ++j) {
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t* p = w.packed + (j * w.width + block * LEVEL_BLOCK) / 2;
      __m512 acc[ROWS][2];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int c = 0; c < LEVEL_BLOCK / 16; ++c) {
        int64_t v;
        std::memcpy(&v, p + 8 * c, sizeof v);
        const __m512i number = _mm512_cvtepu8_epi32(_mm_multishift_epi64_epi8(places, _mm_set1_epi64x(v)));  // its lowest four bits
        const __m512 q = _mm512_permutexvar_ps(number, levels);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          acc[r][c % 2] = _mm512_fmadd_ps(q, _mm512_loadu_ps(x + r * w.width + block * LEVEL_BLOCK + 16 * c), acc[r][c % 2]);
      }
      const __m512 scale = _mm512_set1_ps(w.scale[j * blocks + block]);
      for (int r = 0; r < ROWS; ++r) total[r] = _mm512_fmadd_ps(_mm512_add_ps(acc[r][0], acc[r][1]), scale, total[r]);
    }
    for (int r = 0; r < ROWS; ++r) out[r * w.rows + j] = _mm512_reduce_add_ps(total[r]);
  }
}

// Which of them multiplies m rows on this CPU.
auto for_rows_levels(int64_t m) {
  if (has_avx512()) return m == 1 ? few_rows_levels512<1> : m == 2 ? few_rows_levels512<2> : m == 3 ? few_rows_levels512<3> : few_rows_levels512<4>;
  return m == 1 ? few_rows_levels<1> : m == 2 ? few_rows_levels<2> : m == 3 ? few_rows_levels<3> : few_rows_levels<4>;
}

// `x` has `given` columns of the `width` that the weights have: behind them rows are filled up with zeros.
void few_levels(const Levels& w, const float* x, int64_t m, int64_t given, float* out) {
  std::vector<float> filled(m * w.width, 0.0f);
  for (int64_t r = 0; r < m; ++r) std::memcpy(filled.data() + r * w.width, x + r * given, given * sizeof(float));
  const auto run = for_rows_levels(m);
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

}  // namespace
