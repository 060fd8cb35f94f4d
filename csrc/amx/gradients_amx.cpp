// The weights' gradients, outside of time, through products of bfloat16 tiles: see tiles.h.
//
//     dW_ih = da^T x,  dW_hh = da^T h',  dbias = sum of da over rows
#include "amx.h"

#ifdef __AMX_BF16__
#include "../team.h"
#include "tiles.h"

#include <atomic>

namespace rnn {
namespace {

// ---- One product, [x h']^T da, turned over at the end ----
//
// [x h']^T is the operand of rows, one for each feature; all threads copy it together, a part of
// the N rows at a time. Of da each thread has a share of the columns, which nobody else reads. It
// takes a group of them at a time, so many that their sums stay in its own cache, and copies them
// in chunks of N: 32 columns at a time, which stay in the nearest cache for all features.

constexpr int64_t kPart = 4096;  // rows of N in a part
template <typename T> constexpr int64_t kChunk = sizeof(T) == 4 ? 8 : 16;  // blocks of 32 rows
template <typename T>  // numbers in a chunk's pair of tiles
constexpr int64_t kPair = kChunk<T> * kParts<T> * 2 * kTileNumbers;
constexpr int64_t kSumBytes = 600 << 10;  // of a group

template <typename T> struct Weights {
  const T* da;                   // (N,4H)
  std::vector<const T*> x, h;    // N rows: of x, and of h'
  float *dw_ih, *dw_hh, *dbias;  // as in lstm.h; dbias at first zero, (pairs of columns * 32)
  Bf16* features;                // operand of rows (feature tiles, blocks of a part)
  Bf16* columns;                 // operand of columns: a chunk for each thread
  float* sums;                   // (pairs of columns, feature tiles, 2, 16, 16)
  int64_t N, I, H, tiles;        // feature tiles: first those of x, then of h'
  std::atomic<bool>* nan;        // becomes true if a result is NaN
};

// Copies 16 features, from f on, of rows n0 .. n1 to `to`: features become rows.
template <typename T>
void put_features(const std::vector<const T*>& rows, int64_t f, int64_t width, int64_t n0,
                  int64_t n1, Bf16* to) {
  constexpr int P = kParts<T>;
  for (int64_t n = n0; n < n1; n += 32, to += P * kTileNumbers)
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t even = n + 2 * j, odd = even + 1;
      __m512i pair[P];
      pairs(rows[std::min(even, n1 - 1)] + f, even < n1 ? width - f : 0,
            rows[std::min(odd, n1 - 1)] + f, odd < n1 ? width - f : 0, pair);
      for (int p = 0; p < P; ++p) put_across(to + p * kTileNumbers + 2 * j, pair[p]);
    }
}

// Copies 32 columns, from g on, of rows n0 .. n1 of da (N,G) to `to`, and adds them to dbias.
template <typename T>
void put_da(const T* da, int64_t G, int64_t g, int64_t n0, int64_t n1, Bf16* to, float* dbias) {
  constexpr int P = kParts<T>;
  Floats sum[2] = {};
  for (int64_t n = n0; n < n1; n += 32, to += P * 2 * kTileNumbers)
    for (int64_t j = 0; j < 16; ++j)
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t even = n + 2 * j, exist = G - g - v * 16;
        const T* at = da + even * G + g + v * 16;
        __builtin_prefetch(at + 32), __builtin_prefetch(at + G + 32);  // of the next columns
        __m512i pair[P];
        pairs(at, even < n1 ? exist : 0, at + G, even + 1 < n1 ? exist : 0, pair);
        put_columns<P>(to + v * kTileNumbers + j * 32, pair);
        for (int p = 0; p < P; ++p)  // a bfloat16 is the upper half of a float32
          sum[v] += (Floats)_mm512_slli_epi32(pair[p], 16) +
                    (Floats)_mm512_and_si512(pair[p], _mm512_set1_epi32(0xffff0000));
      }
  for (int v = 0; v < 2; ++v) put(dbias + v * 16, get(dbias + v * 16, 16) + sum[v], 16);
}

template <typename T> void weight_gradients(const Weights<T>& a, int64_t id, int64_t count) {
  constexpr int P = kParts<T>;
  const int64_t G = 4 * a.H, tiles_x = (a.I + 15) / 16, tile_sums = 2 * kSums;
  const int64_t all = (G + 31) / 32, p0 = all * id / count, p1 = all * (id + 1) / count;
  const int64_t group = std::max<int64_t>(1, kSumBytes / (a.tiles * tile_sums * 4));
  const int64_t next = std::min(kPart, round_up(a.N, 32)) / 32 * P * kTileNumbers;
  Bf16* const columns = a.columns + id * kPair<T>;
  TileRegisters registers(16);
  for (int64_t n0 = 0; n0 < a.N; n0 += kPart) {
    const int64_t n1 = std::min(a.N, n0 + kPart);
    for (int64_t m = id; m < a.tiles; m += count)
      if (m < tiles_x) put_features(a.x, m * 16, a.I, n0, n1, a.features + m * next);
      else put_features(a.h, (m - tiles_x) * 16, a.H, n0, n1, a.features + m * next);
    barrier();
    for (int64_t g = p0; g < p1; g += group)
      for (int64_t n = n0; n < n1; n += kChunk<T> * 32) {
        const int64_t end = std::min(n1, n + kChunk<T> * 32), blocks = (end - n + 31) / 32;
        for (int64_t p = g; p < std::min(p1, g + group); ++p) {
          put_da(a.da, G, p * 32, n, end, columns, a.dbias + p * 32);
          for (int64_t m = 0; m < a.tiles; m += 2) {
            const Bf16* features = a.features + m * next + (n - n0) / 32 * P * kTileNumbers;
            const Sums sums{a.sums + (p * a.tiles + m) * tile_sums, 16, kSums, tile_sums};
            if (n == 0) product<P>(true, features, next, columns, blocks, sums, [] {});
            else product<P, true>(true, features, next, columns, blocks, sums, [] {});
          }
        }
      }
    barrier();
  }
  const __m512i line = _mm512_mullo_epi32(_mm512_set1_epi32(16), _mm512_set_epi32(
      15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  __mmask16 nan = 0;
  for (int64_t g = p0 * 32; g < std::min(G, p1 * 32); ++g)
    for (int64_t m = 0; m < a.tiles; ++m) {
      const float* sums = a.sums + (g / 32 * a.tiles + m) * tile_sums + g % 32 / 16 * kSums;
      const Floats v = _mm512_i32gather_ps(line, sums + g % 16, 4);
      const int64_t f = (m < tiles_x ? m : m - tiles_x) * 16;
      nan |= is_nan(v);
      if (m < tiles_x) put(a.dw_ih + g * a.I + f, v, a.I - f);
      else if (f < a.H) put(a.dw_hh + g * a.H + f, v, a.H - f);
    }
  if (nan) *a.nan = true;
}

}  // namespace

std::optional<Three> weight_gradients_amx(const at::Tensor& da, const at::Tensor& x,
                                          const at::Tensor& h, const at::Tensor& h0,
                                          at::IntArrayRef sizes, bool reverse) {
  const int64_t N = x.size(0), I = x.size(1), H = h0.size(1);
  const auto like = da.options();
  if (kernel() != Kernel::amx || N == 0 || I == 0) return {};
  if (like.dtype() != at::kBFloat16 &&
      (like.dtype() != at::kFloat || 4.0 * N * H * (H + I) < 2e7)) return {};
  const auto da_ = da.contiguous(), x_ = x.contiguous(), h_ = h.contiguous();
  const auto h0_ = h0.contiguous();
  const auto steps = walk(sizes, reverse);
  const auto floats = like.dtype(at::kFloat);
  auto dw_ih = buffer({4 * H, I}, floats), dw_hh = buffer({4 * H, H}, floats);
  auto dbias = at::zeros({round_up(4 * H, 32)}, floats);
  std::atomic<bool> nan = false;
  auto compute = [&](auto type) {
    using T = decltype(type);
    const int64_t tiles = round_up((I + 15) / 16 + (H + 15) / 16, 2), pairs = (H + 7) / 8;
    auto features = buffer({tiles, std::min(kPart, round_up(N, 32)), kParts<T> * 16},
                           like.dtype(at::kBFloat16));
    auto columns = buffer({at::get_num_threads(), kPair<T>}, like.dtype(at::kBFloat16));
    auto sums = buffer({pairs, tiles, 2 * kSums}, floats);
    Weights<T> a{data<T>(da_), std::vector<const T*>(N), std::vector<const T*>(N),
                 data<float>(dw_ih), data<float>(dw_hh), data<float>(dbias),
                 data<Bf16>(features), data<Bf16>(columns), data<float>(sums), N, I, H, tiles,
                 &nan};
    for (const Step& s : steps)
      for (int64_t b = 0; b < s.rows; ++b) {
        a.x[s.row + b] = data<T>(x_) + (s.row + b) * I;
        a.h[s.row + b] = b < s.going ? data<T>(h_) + (s.prev + b) * H : data<T>(h0_) + b * H;
      }
    team_of(pairs, [&](int64_t id, int64_t count) { weight_gradients(a, id, count); });
  };
  if (like.dtype() == at::kFloat) compute(float{});
  else compute(Bf16{});
  if (nan && like.dtype() == at::kFloat) return {};
  return Three{dw_ih, dw_hh, dbias.resize_({4 * H})};
}

}  // namespace rnn
#endif
