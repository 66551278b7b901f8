// Few rows times weights 64 at a time, on CPUs whose AVX-512 has VNNI and VBMI (Ice Lake, Zen 4, and later): vpdpbusd multiplies four bytes
// without a sign by four with one and adds all up, exact.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")))

namespace {

bool avx512_wanted = true;

// Whether they are used.
bool has_avx512() {
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  return found && avx512_wanted;
}

// Says whether they shall be used where the CPU has them: to measure and test the others there.
void use_avx512(bool wanted) { avx512_wanted = wanted; }

// The first `count` of 16, of 64.
AVX512 inline __mmask16 first16(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }
AVX512 inline __mmask64 first64(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// x (ROWS, stride) int8 with zeros behind the width k, times w (n, k): the channels from n0 to n1 of `sums` (ROWS, n). Weights have 128 added, and
// `excess` (ROWS), 128 times the sum of a row, is taken off again. Sums that wrap on the way come back.
template <int ROWS>
AVX512 void few_sums64(const int8_t* x, int64_t stride, const uint32_t* excess, const int8_t* w, int64_t k, int64_t n0, int64_t n1, int32_t* sums,
                       int64_t n) {
  const __m512i flip = _mm512_set1_epi8(-128);
  for (int64_t j = n0; j < n1; ++j) {
    const int8_t* row = w + j * k;
    __m512i acc[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 128 <= k; i += 128) {
      const __m512i a = _mm512_xor_si512(_mm512_loadu_si512(row + i), flip), b = _mm512_xor_si512(_mm512_loadu_si512(row + i + 64), flip);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], a, _mm512_loadu_si512(x + r * stride + i));
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], b, _mm512_loadu_si512(x + r * stride + i + 64));
      }
    }
    for (; i < k; i += 64) {
      const __m512i a = _mm512_xor_si512(_mm512_maskz_loadu_epi8(first64(k - i), row + i), flip);
      for (int r = 0; r < ROWS; ++r) acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], a, _mm512_loadu_si512(x + r * stride + i));
    }
    for (int r = 0; r < ROWS; ++r)
      sums[r * n + j] = static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(acc[r][0], acc[r][1]))) - excess[r]);
  }
}

}  // namespace
