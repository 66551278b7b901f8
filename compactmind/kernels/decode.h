// One token of a Llama, all blocks in one call.
#pragma once
#include "activations.h"
#include "attention.h"
#include "grouped.h"
#include "int8.h"
#include "levels.h"

namespace {

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
    std::vector<int8_t> q(width);
    const float step = quantize_row(x, width, c.numel() ? *c.const_data_ptr<float>() : 0.0f, q.data());
    few_int8(q.data(), 1, width, a.const_data_ptr<int8_t>(), out(), Scales{&step, b.const_data_ptr<float>(), nullptr}, y);
  }

  void grouped_product(const float* x, int64_t width, float* y) const {
    const Grouped g = grouped(a, b, c, first, second, width);
    few_grouped(g, first, x, 1, y);
  }
};

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
