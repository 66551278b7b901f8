// What an int8 product leaves to whoever reads it: rows with scales and bias, or still without.
#pragma once
#include "activations.h"
#include "int8.h"

namespace {

// Rows of a product: int32 of another kernel with the scales to come, or float32 that has them.
struct Product {
  const int32_t* sums = nullptr;
  const float *values = nullptr, *rows = nullptr, *channels = nullptr, *bias = nullptr;
  int64_t width;

  Product(const Tensor& product, const optional<Tensor>& row_scale, const optional<Tensor>& channel_scale, const optional<Tensor>& added)
      : width(product.size(1)) {
    TORCH_CHECK(product.dim() == 2 && product.is_contiguous(), "product: contiguous (rows, channels)");
    TORCH_CHECK(!added || (added->is_contiguous() && added->scalar_type() == at::kFloat && added->numel() == width), "bias: float32 (channels,)");
    bias = added ? added->const_data_ptr<float>() : nullptr;
    if (product.scalar_type() == at::kFloat) {
      TORCH_CHECK(!row_scale && !channel_scale && !added, "float32 has its scales and bias");
      values = product.const_data_ptr<float>();
      return;
    }
    TORCH_CHECK(product.scalar_type() == at::kInt && row_scale && row_scale->is_contiguous() && row_scale->numel() == product.size(0) && channel_scale &&
                    channel_scale->is_contiguous() && channel_scale->numel() == width,
                "int32 with a scale for each row and each channel");
    sums = product.const_data_ptr<int32_t>();
    rows = row_scale->const_data_ptr<float>();
    channels = channel_scale->const_data_ptr<float>();
  }

  void row(int64_t r, float* to) const {
    if (values) {
      std::memcpy(to, values + r * width, width * sizeof(float));
    } else {
      scale_row(sums + r * width, channels, rows[r], bias, width, to);
    }
  }
};

int64_t rows_at_once(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)); }

}  // namespace
