// int8 times int8, exact in int32.
#pragma once
#include <cpuid.h>

#include "floats.h"

namespace {

constexpr int64_t MR = 6, VECTORS = 2, NR = 8 * VECTORS, KC = 768;
constexpr int64_t PANELS = 86;  // of MR rows each whose inputs are to stay in a cache while all channels read them
constexpr int64_t APART_COLUMNS = 30;  // four columns apart cost as much as is saved on so many by adding up in twos

int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

__m256i widened(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

struct Scales {
  const float *row, *channel, *bias;  // bias may be missing
};

// x (ROWS, stride) int16 with zeros behind the width k, times w (n, k): the channels from n0 to n1 of out (ROWS, n).
template <int ROWS>
void few_rows(const int16_t* x, int64_t stride, const int8_t* w, int64_t k, int64_t n0, int64_t n1, Scales scales, float* out, int64_t n) {
  for (int64_t j = n0; j < n1; ++j) {
    const int8_t* row = w + j * k;
    __m256i acc[ROWS][2];
    for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    const auto add = [&](const int8_t* weights, int64_t at) {
      const __m256i a = widened(weights), b = widened(weights + 16);
      for (int r = 0; r < ROWS; ++r) {
        const auto* from = reinterpret_cast<const __m256i*>(x + r * stride + at);
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, _mm256_loadu_si256(from)));
        acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(b, _mm256_loadu_si256(from + 1)));
      }
    };
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) add(row + i, i);
    if (i < k) {
      alignas(32) int8_t rest[32] = {};
      std::memcpy(rest, row + i, k - i);
      add(rest, i);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float y = static_cast<float>(sum_of(_mm256_add_epi32(acc[r][0], acc[r][1]))) * scales.channel[j] * scales.row[r];
      out[r * n + j] = scales.bias ? y + scales.bias[j] : y;
    }
  }
}

// y (n) = sums of int8 products, times the scale of each channel and of the row, plus the bias if there is one.
void scale_row(const int32_t* sums, const float* channels, float row, const float* bias, int64_t n, float* y) {
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = static_cast<float>(sums[j]) * channels[j] * row;
    y[j] = bias ? scaled + bias[j] : scaled;
  }
}

// x (m, k) int8, m from 1 to FEW, times w (n, k), scaled: y (m, n).
void few_int8(const int8_t* x, int64_t m, int64_t k, const int8_t* w, int64_t n, Scales scales, float* y) {
  const int64_t at_once = std::max<int64_t>(16, 65536 / std::max<int64_t>(k, 1));
  if (has_avx512()) {
    const int64_t stride = (k + 63) / 64 * 64;
    std::vector<int8_t> padded(m * stride, 0);
    std::vector<uint32_t> excess(m, 0);
    for (int64_t r = 0; r < m; ++r) {
      std::memcpy(padded.data() + r * stride, x + r * k, k);
      int64_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += x[r * k + i];
      excess[r] = static_cast<uint32_t>(128 * sum);
    }
    std::vector<int32_t> sums(m * n);
    const auto run = m == 1 ? few_sums64<1> : m == 2 ? few_sums64<2> : m == 3 ? few_sums64<3> : few_sums64<4>;
    at::parallel_for(0, n, at_once, [&](int64_t n0, int64_t n1) {
      run(padded.data(), stride, excess.data(), w, k, n0, n1, sums.data(), n);
      for (int64_t r = 0; r < m; ++r)
        scale_row(sums.data() + r * n + n0, scales.channel + n0, scales.row[r], scales.bias ? scales.bias + n0 : nullptr, n1 - n0, y + r * n + n0);
    });
    return;
  }
  const int64_t stride = (k + 31) / 32 * 32;
  std::vector<int16_t> wide(m * stride, 0);
  for (int64_t r = 0; r < m; ++r) std::copy(x + r * k, x + (r + 1) * k, wide.begin() + r * stride);
  const auto run = m == 1 ? few_rows<1> : m == 2 ? few_rows<2> : m == 3 ? few_rows<3> : few_rows<4>;
  at::parallel_for(0, n, at_once, [&](int64_t n0, int64_t n1) { run(wide.data(), stride, w, k, n0, n1, scales, y, n); });
}

// 8 rows of 8 int32 become 8 columns.
void transpose8(__m256i* r) {
  __m256i t[8], s[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    s[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    s[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    s[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x31);
  }
}

// Rows as they are packed for `tile`: columns in fours, (depth / 4, apart, 4) bytes, of up to 8 rows of int8 (rows, k) from row `first` and column k0
// on, `depth` a multiple of 32, each byte with the bits of `flip` turned. What is missing is 0 before that. With `apart` below 8 the next four
// overwrite what is too much, and the last ones write behind their end.
void pack(const int8_t* from, int64_t rows, int64_t k, int64_t first, int64_t k0, int64_t depth, int64_t apart, uint8_t flip, uint8_t* to) {
  for (int64_t i = 0; i < depth; i += 32) {
    const int64_t left = std::min<int64_t>(32, k - (k0 + i));
    __m256i r[8];
    for (int64_t row = 0; row < 8; ++row) {
      const int8_t* at = from + (first + row) * k + k0 + i;
      if (first + row >= rows || row >= apart) {
        r[row] = _mm256_setzero_si256();
      } else {
        alignas(32) int8_t rest[32] = {};
        if (left < 32) std::memcpy(rest, at, left);
        const __m256i bytes = left < 32 ? _mm256_load_si256(reinterpret_cast<const __m256i*>(rest)) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        r[row] = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(flip)));
      }
    }
    transpose8(r);
    for (int64_t four = 0; four < 8; ++four)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (i / 4 + four) * apart * 4), r[four]);
  }
}

// Four columns of a row that are multiplied apart, and where they are: columns 4 * four to 4 * four + 3.
struct Apart {
  int32_t four;
  int8_t x[4];
};

// vpmaddubsw multiplies bytes without a sign (weights, 128 added) by bytes with one (x) and adds two products up in 16 bits. FOURS = 2: two of
// those are added before they are widened, so that of eight columns 0, 1, 4, 5 make one sum and 2, 3, 6, 7 another. 128 * 255 still fits, so
// neither the positive nor the negative x of a sum may come to more. Of 32 columns: a bit at the first one of every sum whose x do.
template <int FOURS>
uint32_t too_much(const int8_t* x) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), zero = _mm256_setzero_si256(), ones = _mm256_set1_epi8(1);
  __m256i above = _mm256_maddubs_epi16(_mm256_max_epi8(bytes, zero), ones);
  __m256i below = _mm256_maddubs_epi16(_mm256_sub_epi8(zero, _mm256_min_epi8(bytes, zero)), ones);
  if (FOURS == 2) {
    above = _mm256_add_epi16(above, _mm256_srli_epi64(above, 32));
    below = _mm256_add_epi16(below, _mm256_srli_epi64(below, 32));
  }
  const __m256i over = _mm256_cmpgt_epi16(_mm256_max_epi16(above, below), _mm256_set1_epi16(128));
  return static_cast<uint32_t>(_mm256_movemask_epi8(over)) & (FOURS == 2 ? 0x05050505u : 0x55555555u);
}

// Takes the largest x of such sums out of a row (depth, a multiple of 32) until none is left.
template <int FOURS>
void take_apart(int8_t* row, int64_t depth, std::vector<Apart>& apart) {
  for (int64_t i = 0; i < depth; i += 32)
    for (uint32_t found = too_much<FOURS>(row + i); found; found &= found - 1) {
      int8_t* first = row + i + __builtin_ctz(found);
      for (const int sign : {1, -1}) {
        while (true) {
          int total = 0;
          int8_t* largest = first;
          for (int8_t* two = first; two < first + 4 * FOURS; two += 4)
            for (int8_t* at : {two, two + 1}) {
              total += std::max(0, sign * *at);
              if (sign * *at > sign * *largest) largest = at;
            }
          if (total <= 128) break;
          const int64_t column = largest - row, four = column / 4, place = column % 4;
          // beside another of the same four columns if that is of the other two: both of two could be too much again
          if (apart.empty() || apart.back().four != four || apart.back().x[place] || apart.back().x[place ^ 1])
            apart.push_back({static_cast<int32_t>(four), {}});
          apart.back().x[place] = *largest;
          *largest = 0;
        }
      }
    }
}

// c (MR, NR) int32 = or += x (depth / 4, MR, 4) times weights (depth / 4, NR, 4), which are 128 too large, and what is `apart` of each row.
template <int FOURS>
void tile(const uint8_t* x, const uint8_t* weights, const std::vector<Apart>* apart, int64_t depth, int32_t* c, bool add) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[MR][VECTORS];
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h)
      acc[r][h] = add ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * NR + 8 * h)) : _mm256_setzero_si256();
  const auto of = [&](int64_t four, int h) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + (four * VECTORS + h) * 32)); };
  const auto broadcast = [](const void* four) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  };
  for (int64_t i = 0; i < depth / 4; i += FOURS)
    for (int r = 0; r < MR; ++r) {
      const __m256i first = broadcast(x + (i * MR + r) * 4), second = FOURS == 2 ? broadcast(x + ((i + 1) * MR + r) * 4) : first;
      for (int h = 0; h < VECTORS; ++h) {
        __m256i sums = _mm256_maddubs_epi16(of(i, h), first);
        if (FOURS == 2) sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(of(i + 1, h), second));
        acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(sums, ones));
      }
    }
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * NR + 8 * h), acc[r][h]);
  for (int r = 0; r < MR; ++r) {
    if (apart[r].empty()) continue;
    __m256i more[VECTORS];
    for (int h = 0; h < VECTORS; ++h) more[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * NR + 8 * h));
    for (const Apart& each : apart[r]) {
      const __m256i four = broadcast(each.x);
      for (int h = 0; h < VECTORS; ++h) more[h] = _mm256_add_epi32(more[h], _mm256_madd_epi16(_mm256_maddubs_epi16(of(each.four, h), four), ones));
    }
    for (int h = 0; h < VECTORS; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * NR + 8 * h), more[h]);
  }
}

// The same with AVX-VNNI, which multiplies four bytes without a sign by four with one and adds all up, exact (vpdpbusd).
#if defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 12
#define KNOWS_AVX_VNNI 1

__attribute__((target("avx2,fma,avxvnni"))) void tile_vnni(const uint8_t* x, const uint8_t* weights, int64_t depth, int32_t* c, bool add) {
  __m256i acc[MR][VECTORS];
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h)
      acc[r][h] = add ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + r * NR + 8 * h)) : _mm256_setzero_si256();
  for (int64_t i = 0; i < depth / 4; ++i) {
    __m256i four[VECTORS];
    for (int h = 0; h < VECTORS; ++h) four[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + (i * VECTORS + h) * 32));
    for (int r = 0; r < MR; ++r) {
      int32_t bytes;
      std::memcpy(&bytes, x + (i * MR + r) * 4, sizeof bytes);
      for (int h = 0; h < VECTORS; ++h) acc[r][h] = _mm256_dpbusd_avx_epi32(acc[r][h], four[h], _mm256_set1_epi32(bytes));
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int h = 0; h < VECTORS; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + r * NR + 8 * h), acc[r][h]);
}
#endif

// Whether the CPU has AVX-VNNI (leaf 7, subleaf 1, bit 4 of EAX) and the compiler knew it.
bool has_avx_vnni() {
#ifdef KNOWS_AVX_VNNI
  unsigned a = 0, b = 0, c = 0, d = 0;
  static const bool found = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  return found;
#else
  return false;
#endif
}

// c (last - first, NR) int32, less what is too much of each row, scaled, into the columns from j on of the rows from `first` on of out (m, n).
void scaled(const int32_t* c, const uint32_t* excess, int64_t first, int64_t last, int64_t j, int64_t n, Scales scales, float* out) {
  const int64_t columns = std::min(NR, n - j);
  float channel[NR] = {}, bias[NR] = {}, y[NR];
  std::memcpy(channel, scales.channel + j, columns * sizeof(float));
  if (scales.bias) std::memcpy(bias, scales.bias + j, columns * sizeof(float));
  for (int64_t r = first; r < last; ++r, c += NR) {
    const __m256 row = _mm256_set1_ps(scales.row[r]);
    const __m256i off = _mm256_set1_epi32(static_cast<int32_t>(excess[r]));
    float* to = columns == NR ? out + r * n + j : y;
    for (int h = 0; h < VECTORS; ++h) {
      const __m256 sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + 8 * h)), off));
      const __m256 product = _mm256_mul_ps(_mm256_mul_ps(sums, _mm256_loadu_ps(channel + 8 * h)), row);
      _mm256_storeu_ps(to + 8 * h, scales.bias ? _mm256_add_ps(product, _mm256_loadu_ps(bias + 8 * h)) : product);
    }
    if (columns < NR) std::memcpy(out + r * n + j, y, columns * sizeof(float));
  }
}

// `vnni`: with AVX-VNNI where the CPU has it.
Tensor int8_linear(const Tensor& q, const Tensor& row_scale, const Tensor& weight, const Tensor& channel_scale, const optional<Tensor>& bias,
                   bool vnni) {
  const int64_t m = q.size(0), k = q.size(1), n = weight.size(0);
  TORCH_CHECK(q.is_contiguous() && weight.is_contiguous() && weight.size(1) == k, "q (rows, in) and weight (out, in): contiguous int8");
  TORCH_CHECK(row_scale.is_contiguous() && row_scale.numel() == m && channel_scale.is_contiguous() && channel_scale.numel() == n,
              "a scale for each row and each channel");
  TORCH_CHECK(k <= 131072, "sums of more than 131,072 products do not fit into 32 bits");
  Tensor out = at::empty({m, n}, q.options().dtype(at::kFloat));
  const auto *x = q.const_data_ptr<int8_t>(), *w = weight.const_data_ptr<int8_t>();
  const Scales scales{row_scale.const_data_ptr<float>(), channel_scale.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr};
  auto* y = out.mutable_data_ptr<float>();
  if (m <= FEW) {
    if (m > 0) few_int8(x, m, k, w, n, scales, y);
    return out;
  }
#ifdef KNOWS_AVX_VNNI
  vnni = vnni && has_avx_vnni();
#else
  vnni = false;
#endif
  const int64_t panels = (m + MR - 1) / MR, whole = (n + NR - 1) / NR, depth = (k + 31) / 32 * 32, blocks = (depth + KC - 1) / KC;
  const int64_t stride = MR * depth + 32;
  Tensor packed = at::empty({panels * stride}, q.options().dtype(at::kByte));  // each panel (depth / 4, MR, 4)
  auto* a = packed.mutable_data_ptr<uint8_t>();
  std::vector<uint32_t> excess(panels * MR, 0);  // 128 times the sum of each row, as weights have 128 added; sums that wrap on the way come back
  std::vector<std::vector<Apart>> apart(vnni ? 0 : blocks * panels * MR);
  std::vector<char> twos(vnni ? 0 : blocks * panels);  // whether `tile` adds fours of columns up in twos
  at::parallel_for(0, panels, 4, [&](int64_t p0, int64_t p1) {
    std::vector<int8_t> rows(MR * depth, 0);
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t here = std::min(MR, m - p * MR);
      for (int64_t r = 0; r < here; ++r) {
        int8_t* row = rows.data() + r * depth;
        std::memcpy(row, x + (p * MR + r) * k, k);
        int32_t sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += row[i];
        excess[p * MR + r] = 128u * static_cast<uint32_t>(sum);
      }
      for (int64_t block = 0; !vnni && block < blocks; ++block) {
        const int64_t k0 = block * KC, deep = std::min(KC, depth - k0), at = block * panels + p;
        int64_t found = 0;
        for (int64_t r = 0; r < here; ++r)
          for (int64_t i = 0; i < deep; i += 32) found += __builtin_popcount(too_much<2>(rows.data() + r * depth + k0 + i));
        twos[at] = found * APART_COLUMNS <= here * deep;
        for (int64_t r = 0; r < here; ++r)
          (twos[at] ? take_apart<2> : take_apart<1>)(rows.data() + r * depth + k0, deep, apart[at * MR + r]);
      }
      pack(rows.data(), here, depth, 0, 0, depth, MR, 0, a + p * stride);
    }
  });
  at::parallel_for(0, whole, 1, [&](int64_t j0, int64_t j1) {
    std::vector<int32_t> c(std::min(panels, PANELS) * MR * NR);
    alignas(64) uint8_t b[KC * NR];
    for (int64_t p0 = 0; p0 < panels; p0 += PANELS)
      for (int64_t j = j0 * NR; j < j1 * NR; j += NR) {
        const int64_t p1 = std::min(p0 + PANELS, panels);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t k0 = block * KC, here = std::min(KC, depth - k0);
          for (int64_t half = 0; half < NR; half += 8) pack(w, n, k, j + half, k0, here, NR, 0x80, b + half * 4);
          for (int64_t p = p0; p < p1; ++p) {
            const uint8_t* from = a + p * stride + k0 * MR;
            int32_t* to = c.data() + (p - p0) * MR * NR;
#ifdef KNOWS_AVX_VNNI
            if (vnni) {
              tile_vnni(from, b, here, to, block > 0);
              continue;
            }
#endif
            const int64_t at = block * panels + p;
            (twos[at] ? tile<2> : tile<1>)(from, b, apart.data() + at * MR, here, to, block > 0);
          }
        }
        scaled(c.data(), excess.data(), p0 * MR, std::min(p1 * MR, m), j, n, scales, y);
      }
  });
  return out;
}

// product (m, n) int32 of another kernel, scaled: float32.
Tensor scale_product(const Tensor& product, const Tensor& row_scale, const Tensor& channel_scale, const optional<Tensor>& bias) {
  const int64_t m = product.size(0), n = product.size(1);
  TORCH_CHECK(product.is_contiguous() && product.scalar_type() == at::kInt, "product: contiguous int32 (rows, channels)");
  TORCH_CHECK(row_scale.is_contiguous() && row_scale.numel() == m && channel_scale.is_contiguous() && channel_scale.numel() == n,
              "a scale for each row and each channel");
  Tensor out = at::empty({m, n}, product.options().dtype(at::kFloat));
  const auto* from = product.const_data_ptr<int32_t>();
  const auto *rows = row_scale.const_data_ptr<float>(), *channels = channel_scale.const_data_ptr<float>();
  const auto* added = bias ? bias->const_data_ptr<float>() : nullptr;
  auto* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, m, std::max<int64_t>(1, 16384 / std::max<int64_t>(n, 1)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) scale_row(from + r * n, channels, rows[r], added, n, to + r * n);
  });
  return out;
}

}  // namespace
