// The products of a backward pass outside of time, x^T da, h'^T da and da W_ih, as one operator:
// a b as torch.mm, but where that is quicker, for large float32, through three bfloat16 parts: see
// tiles.h.
//
// Both operands are copied, a chunk of K numbers at a time. The narrower one is copied by all
// threads together; of the wider one each thread copies a share of its own, and multiplies it.
#include "lstm.h"
#include "team.h"
#include "tiles.h"

#include <torch/library.h>

namespace rnn {
namespace {

#ifdef __AMX_BF16__
constexpr int P = 3;
constexpr int64_t kChunk = 8;                      // blocks of 32 numbers of K
constexpr int64_t kPair = kChunk * P * 2 * kTile;  // numbers in a chunk's pair of tiles

// Copies a tile of 16 rows, m .. m + 16, x 32 numbers, k .. k + 32, of a (M,K) to `to`.
void put_row_tile(const float* a, int64_t M, int64_t K, bool transposed, int64_t m, int64_t k,
                  Bf16* to) {
  for (int64_t j = 0; j < 16; ++j) {
    if (transposed) {  // 16 rows' numbers k + 2j and k + 2j + 1, which are together in memory
      const float* at = a + (k + 2 * j) * M + m;
      __builtin_prefetch(at + 32), __builtin_prefetch(at + M + 32);
      __m512i pair[P];
      const int64_t n = M - m;
      pairs<P>(get(at, k + 2 * j < K ? n : 0), get(at + M, k + 2 * j + 1 < K ? n : 0), pair);
      for (int p = 0; p < P; ++p) put_across(to + p * kTile + 2 * j, pair[p]);
    } else {
      const float* at = a + (m + j) * K + k;
      const int64_t n = m + j < M ? K - k : 0;
      put_row<P>(to + j * 32, get(at, n));
      put_row<P>(to + j * 32 + 16, get(at + 16, n - 16));
    }
  }
}

// Copies 32 numbers, k .. k + 32, x 32 columns, c .. c + 32, of b (K,C) to `to`.
void put_column_tiles(const float* b, int64_t K, int64_t C, int64_t k, int64_t c, Bf16* to) {
  for (int64_t j = 0; j < 16; ++j)
    for (int64_t v = 0; v < 2; ++v) {
      const float* at = b + (k + 2 * j) * C + c + v * 16;
      const int64_t n = C - c - v * 16;
      __builtin_prefetch(at + 32), __builtin_prefetch(at + C + 32);  // of the next pair of tiles
      put_columns<P>(to + v * kTile + j * 32, get(at, k + 2 * j < K ? n : 0),
                     get(at + C, k + 2 * j + 1 < K ? n : 0));
    }
}

// out (M,C), zero at first, in rows of `stride` numbers, with room for whole pairs of tiles
// out (M,C), at first zero, in rows of `stride` numbers, with room for whole pairs of tiles
void multiply(const float* a, const float* b, int64_t M, int64_t K, int64_t C, bool transposed,
              float* out, int64_t stride) {
  const int64_t pairs_m = (M + 31) / 32, pairs_c = (C + 31) / 32;
  const bool narrow_a = M < C;  // else b is the narrower one
  const int64_t narrow = narrow_a ? pairs_m : pairs_c, wide = narrow_a ? pairs_c : pairs_m;
  auto common = fresh({narrow, kPair}, at::kBFloat16);
  team_of(wide, [&](int64_t id, int64_t count) {
    auto own = at::empty({kPair}, at::kBFloat16);
    TileRegisters registers(true, 16);
    for (int64_t k0 = 0; k0 < K; k0 += kChunk * 32) {
      const int64_t blocks = std::min(kChunk, (K - k0 + 31) / 32);
      auto put_pair = [&](bool of_a, int64_t pair, Bf16* to) {
        for (int64_t k = 0; k < blocks; ++k)
          if (!of_a) put_column_tiles(b, K, C, k0 + k * 32, pair * 32, to + k * P * 2 * kTile);
          else for (int64_t v = 0; v < 2; ++v)
            put_row_tile(a, M, K, transposed, pair * 32 + v * 16, k0 + k * 32,
                         to + (v * kChunk + k) * P * kTile);
      };
      for (int64_t j = id; j < narrow; j += count)
        put_pair(narrow_a, j, data<Bf16>(common) + j * kPair);
      barrier();
      for (int64_t j = wide * id / count; j < wide * (id + 1) / count; ++j) {
        put_pair(!narrow_a, j, data<Bf16>(own));
        for (int64_t i = 0; i < narrow; ++i) {
          const Bf16 *mine = data<Bf16>(own), *ours = data<Bf16>(common) + i * kPair;
          const int64_t m = narrow_a ? i : j, c = narrow_a ? j : i;
          product<P, true>(true, true, narrow_a ? ours : mine, kChunk * P * kTile,
                           narrow_a ? mine : ours, blocks,
                           {out + m * 32 * stride + c * 32, stride, 16, 16 * stride});
        }
      }
      barrier();
    }
  });
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) {
  const bool transposed = !a.is_contiguous();
  if (!use_amx() || a.dim() != 2 || b.dim() != 2 || a.scalar_type() != at::kFloat ||
      b.scalar_type() != at::kFloat || a.size(1) != b.size(0) || !b.is_contiguous() ||
      (transposed && !a.t().is_contiguous()))
    return at::mm(a, b);  // where there is an error, it says so
  const int64_t M = a.size(0), K = a.size(1), C = b.size(1);
  if (std::min({M, K, C}) < 32 || double(M) * K * C < 1e8) return at::mm(a, b);  // is quicker
  const int64_t stride = round_up(C, 32) + 16;  // no power of two: its rows would share cache sets
  auto sums = at::zeros({round_up(M, 32), stride}, a.options());
  multiply(data<float>(a), data<float>(b), M, K, C, transposed, data<float>(sums), stride);
  auto out = sums.narrow(0, 0, M).narrow(1, 0, C).contiguous();
  return out.sum().isfinite().item<bool>() ? out : at::mm(a, b);  // infinity has no parts
}

#else
at::Tensor mm(const at::Tensor& a, const at::Tensor& b) { return at::mm(a, b); }
#endif

}  // namespace

TORCH_LIBRARY_IMPL(rnn, CPU, m) { m.impl("mm", mm); }

}  // namespace rnn
