// What lies between two int8 products of an encoder block, a row at a time: scales and bias, addition and LayerNorm, or GELU, then rounding.
#pragma once
#include "product.h"

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

}  // namespace
