// Products of tiles of bfloat16 numbers, for float32 and for bfloat16 tensors.
//
// A bfloat16 is the upper half of a float32: the same range, but 8 bits of precision instead of 24.
// CPUs with AMX multiply it some ten times faster than float32: one instruction, of 16 cycles,
// multiplies a tile of 16 rows x 32 numbers with one of 32 numbers x 16 columns, and adds the
// result to a tile of 16 x 16 float32 sums. That serves both types of tensors:
//
//   bfloat16   as it is; the sums are float32.
//   float32    a number is the sum of three bfloat16 parts, v = v0 + v1 + v2, of 8 bits each. Of
//              the nine products of parts the six largest, v0w0 v0w1 v1w0 v1w1 v0w2 v2w0, give v w
//              to float32's own precision, and still faster than its own product. Only infinity,
//              and what rounds to it as a bfloat16, has no parts: inf - inf is NaN, and so is all
//              that it meets. And AMX takes subnormal numbers, below 2^-126, for zero: a number
//              below about 2^-108, 3e-33, loses its last parts, and every part and product below
//              2^-126 is lost.
//
// Layout. The inner loop should find each tile as one piece of 1 KiB, so operands are copied into
//   rows     (row tiles, blocks of 32 numbers, parts, 16 rows, 32 numbers)
//   columns  (pairs of column tiles, blocks of 32 numbers, parts, 2 tiles, 16 pairs of numbers,
//             16 columns, 2 numbers): the instruction wants pairs of numbers side by side
#pragma once
#include "../simd.h"

#include <immintrin.h>

namespace rnn {
namespace {

using Bf16 = uint16_t;
using Floats = __m512;              // 16 lanes
constexpr int64_t kTileNumbers = 16 * 32;  // numbers in a tile of an operand
constexpr int64_t kSums = 16 * 16;  // numbers in a tile of sums

template <typename T> constexpr int kParts = sizeof(T) == 4 ? 3 : 1;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- Sixteen numbers at a time, as float32. Of n numbers the first min(n, 16) are in memory ----

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }
inline Floats widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline __m256i narrow(Floats v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline __mmask16 is_nan(Floats v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
inline Floats get(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Floats get(const Bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void put(float* p, Floats v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline void put(Bf16* p, Floats v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }

// ---- Copying into operands ----

template <int P> inline void split(Floats v, __m256i* part) {
  for (int p = 0; p < P; ++p) {
    part[p] = narrow(v);
    v -= widen(part[p]);
  }
}

// Sixteen numbers of one row; `to` is their place in the tile of the first part.
template <int P> inline void put_row(Bf16* to, Floats v) {
  __m256i part[P];
  split<P>(v, part);
  for (int p = 0; p < P; ++p) _mm256_store_si256((__m256i*)(to + p * kTileNumbers), part[p]);
}

// Two rows' numbers side by side, as pairs; of each row the first min(n, 16) are in memory.
inline void pairs(const float* even, int64_t n_even, const float* odd, int64_t n_odd,
                  __m512i* pair) {
  __m256i low[3], high[3];
  split<3>(get(even, n_even), low), split<3>(get(odd, n_odd), high);
  for (int p = 0; p < 3; ++p)
    pair[p] = _mm512_or_si512(_mm512_cvtepu16_epi32(low[p]),
                              _mm512_slli_epi32(_mm512_cvtepu16_epi32(high[p]), 16));
}
inline void pairs(const Bf16* even, int64_t n_even, const Bf16* odd, int64_t n_odd,
                  __m512i* pair) {
  const __m256i low = _mm256_maskz_loadu_epi16(first(n_even), even);
  const __m256i high = _mm256_maskz_loadu_epi16(first(n_odd), odd);
  *pair = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Pairs of sixteen columns; `to` is their place in the column tile of the first part.
template <int P> inline void put_columns(Bf16* to, const __m512i* pair) {
  for (int p = 0; p < P; ++p) _mm512_store_si512(to + p * 2 * kTileNumbers, pair[p]);
}

// Sixteen pairs, each to the next line of a tile: so rows become columns, and columns rows.
inline void put_across(Bf16* to, __m512i pair) {
  const __m512i line = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48,
                                        32, 16, 0);
  _mm512_i32scatter_epi32(to, line, pair, 4);
}

// ---- The product ----

// Where tiles of sums are: `stride` numbers from row to row, `right` and `down` from tile to tile.
struct Sums {
  float* at;
  int64_t stride, right, down;
};

// The tile registers' shapes, for this thread, while this object lives: sums 0 to 3, rows 4 and 5
// (with `rows` rows each), columns 6 and 7.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } shapes;
    for (int k = 0; k < 8; ++k) shapes.rows[k] = k < 6 ? rows : 16;
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
};

template <int P, int R, bool add, typename Between>
void product(const Bf16* rows, int64_t next, const Bf16* columns, int64_t blocks, Sums sums,
                 Between& between) {
  const int64_t bytes = sums.stride * 4;
  float *const below = sums.at + (R - 1) * sums.down;
  asm volatile("" ::: "memory");  // GCC does not know that _tile_loadd reads memory
  if constexpr (add) {
    _tile_loadd(0, sums.at, bytes);
    _tile_loadd(1, sums.at + sums.right, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + sums.right, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // A tile register is loaded anew as soon as its last product is under way, so products with the
  // one to be loaded next come first. (GCC wants the registers' numbers as literals.)
  auto rows_0 = [&](int p) { _tile_loadd(4, rows + p * kTileNumbers, 64); };
  auto rows_1 = [&](int p) {
    if constexpr (R == 2) _tile_loadd(5, rows + next + p * kTileNumbers, 64);
  };
  auto columns_0 = [&](int p) { _tile_loadd(6, columns + 2 * p * kTileNumbers, 64); };
  auto columns_1 = [&](int p) { _tile_loadd(7, columns + (2 * p + 1) * kTileNumbers, 64); };
  auto m00 = [] { _tile_dpbf16ps(0, 4, 6); };
  auto m01 = [] { _tile_dpbf16ps(1, 4, 7); };
  auto m10 = [] {
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
  };
  auto m11 = [] {
    if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
  };
  auto then_rows = [&](int p) { m00(), m01(), rows_0(p), m10(), m11(), rows_1(p); };
  auto then_columns = [&](int p) { m00(), m10(), columns_0(p), m01(), m11(), columns_1(p); };
  for (int64_t k = 0; k < blocks; ++k, rows += P * kTileNumbers, columns += 2 * P * kTileNumbers) {
    rows_0(0), columns_0(P - 1), columns_1(P - 1), rows_1(0);
    if constexpr (P == 3) {  // v0w2, v0w1, v1w1, v1w0, v2w0, v0w0
      then_columns(1), then_rows(1), then_columns(0), then_rows(2), then_rows(0);
    }
    m00(), m01(), m10(), m11();
    between();
  }
  _tile_stored(0, sums.at, bytes);
  _tile_stored(1, sums.at + sums.right, bytes);
  if constexpr (R == 1) return;
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + sums.right, bytes);
}
// sums = (or, with add, +=) up to two row tiles x one pair of column tiles, over so many blocks of
// 32 numbers. `next`: from a row tile to the next one. `between` is called after each block, or not
// at all: tiles are multiplied by a unit of their own, so other work can be done meanwhile.
template <int P, bool add = false, typename Between>
inline void product(bool two, const Bf16* rows, int64_t next, const Bf16* columns, int64_t blocks,
                    Sums sums, Between&& between) {
  if (two) product<P, 2, add>(rows, next, columns, blocks, sums, between);
  else product<P, 1, add>(rows, next, columns, blocks, sums, between);
}

}  // namespace
}  // namespace rnn
