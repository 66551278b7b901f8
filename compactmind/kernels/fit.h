// Scale and zero of groups of weights, chosen by error: what `fit` of methods/quantization/grid.py says, in one pass over each group.
#pragma once
#include "floats.h"

namespace {

enum Zero : int64_t { SYMMETRIC, INTEGER, MINIMUM };  // as ZEROS of grid.py

constexpr float LEAST_HALF = 0x1p-24f;  // the smallest number of fp16

float half_of(float x) { return _cvtsh_ss(_cvtss_sh(std::clamp(x, -65504.0f, 65504.0f), _MM_FROUND_TO_NEAREST_INT)); }

float scale_of(float x) {
  const float scale = half_of(x);
  return scale == 0 ? LEAST_HALF : scale;
}

// One group: its weights and how much each of their errors counts, filled up to whole vectors by weights that do not count.
class Group {
 public:
  Group(int64_t size, int64_t bits, Zero zero, bool one_sided)
      : size_(size), padded_((size + 7) / 8 * 8), top_(static_cast<float>((1 << bits) - 1)), half_(static_cast<float>(1 << (bits - 1))),
        zero_(zero), one_sided_(one_sided), weight_(padded_), counts_(padded_), q_(padded_) {}

  void take(const float* weight, const float* counts) {
    std::copy(weight, weight + size_, weight_.begin());
    std::fill(weight_.begin() + size_, weight_.end(), weight[0]);
    std::copy(counts, counts + size_, counts_.begin());
    std::fill(counts_.begin() + size_, counts_.end(), 0.0f);
    low_ = *std::min_element(weight, weight + size_), high_ = *std::max_element(weight, weight + size_);
    if (one_sided_) low_ = std::min(low_, 0.0f), high_ = std::max(high_, 0.0f);
    if (zero_ == MINIMUM) {
      float total = 0;
      mean_ = 0;
      sums([&](__m256 w, __m256 c, __m256) { return std::pair{c, _mm256_mul_ps(c, w)}; }, total, mean_);
      total_ = std::max(total, 1e-30f), mean_ /= total_;
    }
  }

  // Tries `ranges` of them, from the extremes down.
  void fit(int64_t ranges, float* scale, float* zero) {
    tried_ = false;
    const float longer = high_ > -low_ ? high_ : low_;
    for (int64_t step = 0; step < ranges; ++step) {
      const float share = static_cast<float>(1 - static_cast<double>(step) / 20);
      if (zero_ == SYMMETRIC) {
        try_range(scale_of(share * longer / -half_), half_);
        try_range(scale_of(share * longer / (half_ - 1)), half_);
      } else if (zero_ == INTEGER) {
        const float least = share * std::min(low_, 0.0f), most = share * std::max(high_, 0.0f), s = scale_of((most - least) / top_);
        try_range(s, std::clamp(std::nearbyint(-least / s), 0.0f, top_));
      } else {
        const float width = share * (high_ - low_);
        try_range(scale_of(width / top_), half_of((low_ + high_) / 2 - width / 2));
      }
    }
    *scale = best_scale_, *zero = best_zero_;
  }

 private:
  // As it is tried, then fitted to the integers that gives.
  void try_range(float scale, float zero) {
    compare(scale, zero);
    if (zero_ != MINIMUM) {
      const __m256 z = _mm256_set1_ps(zero);
      float along = 0, spread = 0;
      sums(
          [&](__m256 w, __m256 c, __m256 q) {
            const __m256 step = _mm256_sub_ps(q, z), counted = _mm256_mul_ps(c, step);
            return std::pair{_mm256_mul_ps(counted, w), _mm256_mul_ps(counted, step)};
          },
          along, spread);
      return compare(scale_of(along / std::max(spread, 1e-30f)), zero);
    }
    float mean_q = 0, unused = 0, along = 0, spread = 0;
    sums([&](__m256, __m256 c, __m256 q) { return std::pair{_mm256_mul_ps(c, q), c}; }, mean_q, unused);
    mean_q /= total_;
    const __m256 of_q = _mm256_set1_ps(mean_q), of_w = _mm256_set1_ps(mean_);
    sums(
        [&](__m256 w, __m256 c, __m256 q) {
          const __m256 apart = _mm256_sub_ps(q, of_q), counted = _mm256_mul_ps(c, apart);
          return std::pair{_mm256_mul_ps(counted, _mm256_sub_ps(w, of_w)), _mm256_mul_ps(counted, apart)};
        },
        along, spread);
    float fitted = scale_of(along / std::max(spread, 1e-30f));
    if (one_sided_) fitted = std::max(fitted, LEAST_HALF);
    const float minimum = half_of(mean_ - fitted * mean_q);
    compare(fitted, one_sided_ ? std::min(minimum, 0.0f) : minimum);
  }

  // Rounds all weights, into q_, and keeps scale and zero if they leave less error than any before.
  void compare(float scale, float zero) {
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero), top = _mm256_set1_ps(top_), none = _mm256_setzero_ps();
    __m256 error = none;
    for (int64_t i = 0; i < padded_; i += 8) {
      const __m256 w = _mm256_loadu_ps(&weight_[i]);
      __m256 q = zero_ == MINIMUM ? _mm256_div_ps(_mm256_sub_ps(w, z), s) : _mm256_add_ps(_mm256_div_ps(w, s), z);
      q = _mm256_round_ps(q, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      q = _mm256_min_ps(_mm256_max_ps(q, none), top);
      _mm256_storeu_ps(&q_[i], q);
      const __m256 back = zero_ == MINIMUM ? _mm256_add_ps(_mm256_mul_ps(q, s), z) : _mm256_mul_ps(_mm256_sub_ps(q, z), s);
      const __m256 off = _mm256_sub_ps(back, w);
      error = _mm256_fmadd_ps(_mm256_mul_ps(off, off), _mm256_loadu_ps(&counts_[i]), error);
    }
    const float sum = sum_of(error);
    if (!tried_ || sum < best_error_) best_error_ = sum, best_scale_ = scale, best_zero_ = zero;  // the first, also if it is no number
    tried_ = true;
  }

  // Adds up what `parts` returns of weights, counts and integers, two sums.
  template <class F>
  void sums(F parts, float& first, float& second) {
    __m256 a = _mm256_setzero_ps(), b = a;
    for (int64_t i = 0; i < padded_; i += 8) {
      const auto [x, y] = parts(_mm256_loadu_ps(&weight_[i]), _mm256_loadu_ps(&counts_[i]), _mm256_loadu_ps(&q_[i]));
      a = _mm256_add_ps(a, x), b = _mm256_add_ps(b, y);
    }
    first = sum_of(a), second = sum_of(b);
  }

  const int64_t size_, padded_;
  const float top_, half_;
  const Zero zero_;
  const bool one_sided_;
  std::vector<float> weight_, counts_, q_;
  float low_ = 0, high_ = 0, total_ = 0, mean_ = 0, best_error_ = 0, best_scale_ = 0, best_zero_ = 0;
  bool tried_ = false;
};

// weight (groups, size) float32, counts (some, size) float32, which group number i has i % some of -> scale and zero (groups, 1).
std::tuple<Tensor, Tensor> fit(const Tensor& weight, const Tensor& counts, int64_t bits, int64_t zero, int64_t ranges, bool one_sided) {
  const int64_t groups = weight.size(0), size = weight.size(1), some = counts.size(0);
  const bool fits = weight.is_contiguous() && counts.is_contiguous() && weight.scalar_type() == at::kFloat &&
                    counts.scalar_type() == at::kFloat && counts.size(1) == size && size > 0 && some > 0 && groups % some == 0;
  TORCH_CHECK(fits, "not groups of weights ", weight.sizes(), " and how much they count ", counts.sizes());
  Tensor scales = at::empty({groups, 1}, weight.options()), zeros = at::empty({groups, 1}, weight.options());
  const float *from = weight.const_data_ptr<float>(), *with = counts.const_data_ptr<float>();
  float *scale = scales.mutable_data_ptr<float>(), *to = zeros.mutable_data_ptr<float>();
  at::parallel_for(0, groups, std::max<int64_t>(1, 4096 / size), [&](int64_t first, int64_t last) {
    Group group(size, bits, static_cast<Zero>(zero), one_sided);
    for (int64_t i = first; i < last; ++i) {
      group.take(from + i * size, with + i % some * size);
      group.fit(ranges, scale + i, to + i);
    }
  });
  return {scales, zeros};
}

}  // namespace
