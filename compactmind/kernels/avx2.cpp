// Products of quantized linears on x86 CPUs with AVX2 and FMA, few rows by AVX-512 where there is one: what __init__.py beside this file builds, loads and describes.
#include <torch/library.h>

#include "block.h"
#include "columns.h"
#include "decode.h"
#include "encoder.h"
#include "fit.h"

TORCH_LIBRARY(compactmind, m) {
  m.def("quantize_rows(Tensor x, Tensor? norm, float eps, bool gate, int rotation) -> (Tensor, Tensor)");
  m.def("int8_linear(Tensor q, Tensor row_scale, Tensor weight, Tensor channel_scale, Tensor? bias, bool vnni=True) -> Tensor");
  m.def("scale_product(Tensor product, Tensor row_scale, Tensor channel_scale, Tensor? bias) -> Tensor");
  m.def("gelu_quantize(Tensor product, Tensor? row_scale, Tensor? channel_scale, Tensor? bias) -> (Tensor, Tensor)");
  m.def("add_norm_quantize(Tensor product, Tensor? row_scale, Tensor? channel_scale, Tensor? bias, Tensor residual, Tensor norm, Tensor norm_bias, "
        "float eps) -> (Tensor, Tensor, Tensor)");
  m.def("avx_vnni", &has_avx_vnni);
  m.def("avx512", &has_avx512);
  m.def("use_avx512", &use_avx512);
  m.def("grouped_dequantize(Tensor packed, Tensor scale, Tensor zero, int bits, int size, int width) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero, int bits, int size) -> Tensor");
  m.def("bfloat16_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("levels_linear(Tensor x, Tensor packed, Tensor scale, Tensor levels) -> Tensor");
  m.def("decode(Tensor hidden, Tensor cos, Tensor sin, Tensor[] norms, Tensor[] linears, int[] kinds, Tensor(a!)[] keys, Tensor(b!)[] values, "
        "float eps, float scaling) -> Tensor");
  m.def("turn_heads(Tensor product, Tensor? row_scale, Tensor? channel_scale, Tensor cos, Tensor sin, int turned) -> Tensor");
  m.def("gate_quantize(Tensor product, Tensor? row_scale, Tensor? channel_scale, int rotation) -> (Tensor, Tensor)");
  m.def("add_rms_quantize(Tensor product, Tensor? row_scale, Tensor? channel_scale, Tensor residual, Tensor? norm, float eps, int rotation) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scaling) -> Tensor");
  m.def("fit(Tensor weight, Tensor counts, int bits, int zero, int ranges, bool one_sided) -> (Tensor, Tensor)");
  m.def("round_columns(Tensor block, Tensor factor, Tensor scale, Tensor zero, int bits, int zero_kind) -> (Tensor, Tensor)");
  m.def("round_columns_to_levels(Tensor block, Tensor factor, Tensor pinned, Tensor sign, Tensor scale, Tensor decoded, Tensor levels) -> "
        "(Tensor, Tensor)");
  m.def("cut_off(Tensor weight, Tensor counts, Tensor levels, float[] shares) -> Tensor");
}

TORCH_LIBRARY_IMPL(compactmind, CPU, m) {
  m.impl("quantize_rows", &quantize_rows);
  m.impl("int8_linear", &int8_linear);
  m.impl("scale_product", &scale_product);
  m.impl("gelu_quantize", &gelu_quantize);
  m.impl("add_norm_quantize", &add_norm_quantize);
  m.impl("grouped_dequantize", &grouped_dequantize);
  m.impl("grouped_linear", &grouped_linear);
  m.impl("bfloat16_linear", &bfloat16_linear);
  m.impl("levels_linear", &levels_linear);
  m.impl("decode", &decode);
  m.impl("turn_heads", &turn_heads);
  m.impl("gate_quantize", &gate_quantize);
  m.impl("add_rms_quantize", &add_rms_quantize);
  m.impl("attention", &attention);
  m.impl("fit", &fit);
  m.impl("round_columns", &round_columns);
  m.impl("round_columns_to_levels", &round_columns_to_levels);
  m.impl("cut_off", &cut_off);
}
