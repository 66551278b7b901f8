// What lies between two int8 products of a Llama's block, a row at a time: scales, and turned heads, or addition and RMSNorm, or SiLU times a gate; then
// rotation and rounding.
#pragma once
#include "attention.h"
#include "product.h"

namespace {

// A product (batch * tokens, heads * head_dim) as (batch, tokens, heads, head_dim) with the first `turned` heads turned by their position: halves
// (a, b) become (a cos - b sin, b cos + a sin). cos, sin (batch or 1, tokens, head_dim).
Tensor turn_heads(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale, const Tensor& cos, const Tensor& sin,
                  int64_t turned) {
  const Product from(product, row_scale, channel_scale, {});
  TORCH_CHECK(cos.dim() == 3 && cos.size(1) > 0 && cos.size(2) > 0, "cos: (batch or 1, tokens, head_dim)");
  const int64_t rows = product.size(0), tokens = cos.size(1), size = cos.size(2), heads = from.width / size;
  for (const Tensor* each : {&cos, &sin})
    TORCH_CHECK(each->is_contiguous() && each->scalar_type() == at::kFloat && each->sizes() == cos.sizes() &&
                    (each->size(0) == 1 || each->size(0) * tokens == rows) && rows % tokens == 0 && size % 2 == 0 && heads * size == from.width,
                "cos and sin: contiguous float32 (batch or 1, tokens, head_dim)");
  TORCH_CHECK(0 <= turned && turned <= heads, turned, " of ", heads, " heads");
  Tensor out = at::empty({rows / tokens, tokens, heads, size}, product.options().dtype(at::kFloat));
  const auto *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, rows_at_once(from.width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t angle = (cos.size(0) == 1 ? r % tokens : r) * size;
      from.row(r, to + r * from.width);
      turn(to + r * from.width, turned, size, c + angle, s + angle);
    }
  });
  return out;
}

// SiLU of the first half of a product (rows, 2 width) times the second, rotated if there is a `rotation` -> int8 and the scale of each row.
std::tuple<Tensor, Tensor> gate_quantize(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale,
                                         int64_t rotation) {
  const Product from(product, row_scale, channel_scale, {});
  const int64_t rows = product.size(0), width = from.width / 2;
  require_rotation(rotation, width);
  Tensor q = at::empty({rows, width}, product.options().dtype(at::kChar)), scale = at::empty({rows, 1}, product.options().dtype(at::kFloat));
  auto* to = q.mutable_data_ptr<int8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows, rows_at_once(from.width), [&](int64_t first, int64_t last) {
    std::vector<float> row(from.width);
    for (int64_t r = first; r < last; ++r) {
      from.row(r, row.data());
      gated(row.data(), row.data() + width, width, row.data());
      if (rotation) rotate(row.data(), width, rotation);
      scales[r] = quantize_row(row.data(), width, 0.0f, to + r * width);
    }
  });
  return {q, scale};
}

// product + residual (rows, width), and with a `norm` RMSNorm of that, rotated if there is a `rotation`, as int8 with the scale of each row.
std::tuple<Tensor, Tensor, Tensor> add_rms_quantize(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale,
                                                    const Tensor& residual, const optional<Tensor>& norm, double eps, int64_t rotation) {
  const Product from(product, row_scale, channel_scale, {});
  const int64_t rows = product.size(0), width = from.width, rounded = norm ? rows : 0;
  TORCH_CHECK(residual.is_contiguous() && residual.scalar_type() == at::kFloat && residual.sizes() == product.sizes(), "residual: float32 as the product");
  TORCH_CHECK(!norm || (norm->is_contiguous() && norm->scalar_type() == at::kFloat && norm->numel() == width), "norm: contiguous float32 (width,)");
  require_rotation(rotation, width);
  Tensor out = at::empty({rows, width}, residual.options()), scale = at::empty({rounded, 1}, residual.options());
  Tensor q = at::empty({rounded, width}, residual.options().dtype(at::kChar));
  const auto *added = residual.const_data_ptr<float>(), *weight = norm ? norm->const_data_ptr<float>() : nullptr;
  auto *to = out.mutable_data_ptr<float>(), *scales = scale.mutable_data_ptr<float>();
  auto* bytes = q.mutable_data_ptr<int8_t>();
  at::parallel_for(0, rows, rows_at_once(width), [&](int64_t first, int64_t last) {
    std::vector<float> normed(width);
    for (int64_t r = first; r < last; ++r) {
      float* y = to + r * width;
      from.row(r, y);
      for (int64_t j = 0; j < width; ++j) y[j] += added[r * width + j];
      if (!weight) continue;
      rms_norm(y, weight, width, eps, normed.data());
      if (rotation) rotate(normed.data(), width, rotation);
      scales[r] = quantize_row(normed.data(), width, 0.0f, bytes + r * width);
    }
  });
  return {out, q, scale};
}

}  // namespace
