// Activations to int8, a scale for every row, with what comes before it: norm, gate, rotation.
#pragma once
#include "floats.h"

namespace {

// x (width) -> q and the scale: max(|x|, SMALLEST) / 127, halves to even; `fixed`: the scale there is, not positive: none.
float quantize_row(const float* x, int64_t width, float fixed, int8_t* q) {
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
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), bytes);
  }
  for (; i < width; ++i) q[i] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(std::max(std::min(x[i] * inverse, 127.0f), -127.0f))));
  return step;
}

void require_rotation(int64_t rotation, int64_t width) {
  TORCH_CHECK(rotation == 0 || (width % rotation == 0 && (rotation & (rotation - 1)) == 0), "a rotation of ", rotation, " of ", width, " channels");
}

// x (rows, width) float32 -> int8 and the scale of each row. With a `norm` RMSNorm first; `gate`: x is (rows, 2 width), and SiLU of the first
// half times the second is taken; then, with a `rotation`, every so many channels are rotated.
std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, const optional<Tensor>& norm, double eps, bool gate, int64_t rotation) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat, "x: contiguous float32 (rows, width)");
  const int64_t rows = x.size(0), given = x.size(1), width = gate ? given / 2 : given;
  TORCH_CHECK(!norm || (norm->is_contiguous() && norm->scalar_type() == at::kFloat && norm->numel() == width), "norm: contiguous float32 (width,)");
  require_rotation(rotation, width);
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

}  // namespace
