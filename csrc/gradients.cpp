// The weights' gradients, outside of time:
//
//     dW_ih = da^T x,  dW_hh = da^T h',  dbias = sum of da over rows
//
// In one product, da^T [x h'], of tiles of a few columns of da x a panel of a few vectors of
// features. Each thread has columns of da of its own, and needs no other thread. It takes a chunk
// of the N rows at a time, and copies them so that the inner loop reads one number after the other.
#include "amx/amx.h"
#include "product.h"
#include "team.h"

namespace rnn {
namespace {

constexpr int64_t kChunk = 128;  // words, of N, in a chunk

template <typename P> struct Gradients {
  const typename P::Number* da;                      // (N,4H)
  std::vector<const typename P::Number*> x, before;  // N rows: of x, and of h'
  typename P::Sum *dw_ih, *dw_hh, *dbias;            // as in lstm.h; dbias at first zero
  Vec<typename P::Sum>* sums;      // (panels, 4H, vectors of the panel), of several chunks
  typename P::Words* columns;      // of da, of a chunk: (vectors of 4H, kChunk)
  typename P::Words* features;     // of a panel, of a chunk: (threads, kChunk, kVectors)
  int64_t N, I, H;
};

template <typename P> void gradients(const Gradients<P>& a, int64_t id, int64_t count) {
  using S = typename P::Sum;
  using Word = typename P::Word;
  using Number = typename P::Number;
  constexpr int64_t L = kLanes<S>, most = kTileRows;
  const int64_t G = 4 * a.H, all = ceil_div(G, L), v_x = ceil_div(a.I, L);
  const int64_t g0 = all * id / count * L, g1 = std::min(G, all * (id + 1) / count * L);
  const int64_t vectors = v_x + ceil_div(a.H, L);
  typename P::Words* const features = a.features + id * kChunk * kVectors;
  typename P::Words* const columns = a.columns + g0 / L * kChunk;
  for (int64_t n0 = 0; n0 == 0 || n0 < a.N; n0 += kChunk * P::numbers) {  // also for 0 rows
    const int64_t n1 = std::min(a.N, n0 + kChunk * P::numbers), K = ceil_div(n1 - n0, P::numbers);
    for (int64_t g = g0; g < g1; g += L) {  // columns of da become rows, (4H, K)
      Vec<S> sum[8] = {};  // several, as sums of sums err less than one long sum
      for (int64_t k = 0; k < K; ++k) {
        const int64_t n = n0 + k * P::numbers;
        const Number* row = a.da + n * G + g;
        const auto words = P::words(row, n + 1 < n1 ? row + G : nullptr, G - g);
        sum[k % 8] += P::sum_of(words);
        columns[(g - g0) / L * kChunk + k] = words;
      }
      for (int j = 1; j < 8; ++j) sum[0] += sum[j];
      store(a.dbias + g, load(a.dbias + g, G - g) + sum[0], G - g);
    }
    for_pieces(0, vectors, kVectors, [&](int64_t v0, int64_t v1) {
      auto* to = features;
      for (int64_t k = 0; k < K; ++k)
        for (int64_t v = v0; v < v1; ++v, ++to) {
          const auto& rows = v < v_x ? a.x : a.before;
          const int64_t column = (v < v_x ? v : v - v_x) * L, n = n0 + k * P::numbers;
          const Number* odd = P::numbers == 2 && n + 1 < n1 ? rows[n + 1] + column : nullptr;
          *to = P::words(rows[n] + column, odd, (v < v_x ? a.I : a.H) - column);
        }
      for (int64_t g = g0; g < g1; g += L)
        for_pieces(g, std::min(g + L, g1), most, [&](int64_t r0, int64_t r1) {
          const auto* x = (const Word*)(columns + (g - g0) / L * kChunk) + r0 - g;
          Vec<S> nearest[most * kVectors];  // for a single chunk: stays in the nearest cache
          auto* sums = n1 - n0 == a.N ? nearest : a.sums + v0 * G + r0 * (v1 - v0);
          if (n0 == 0) std::fill_n(sums, (r1 - r0) * (v1 - v0), Vec<S>{});
          product<P>(r1 - r0, v1 - v0, features, sums, x, 1, L, K);
          if (n1 < a.N) return;  // more chunks are to come
          for (int64_t r = r0; r < r1; ++r)
            for (int64_t v = v0; v < v1; ++v, ++sums) {
              const int64_t column = (v < v_x ? v : v - v_x) * L;
              if (v < v_x) store(a.dw_ih + r * a.I + column, *sums, a.I - column);
              else store(a.dw_hh + r * a.H + column, *sums, a.H - column);
            }
        });
    });
  }
}

template <typename P>
Three run(const at::Tensor& da, const at::Tensor& x, const at::Tensor& h, const at::Tensor& h0,
          at::IntArrayRef sizes, bool reverse) {
  using T = typename P::Number;
  using S = typename P::Sum;
  const int64_t N = x.size(0), I = x.size(1), H = h0.size(1);
  const auto floats = da.options().dtype(c10::CppTypeToScalarType<S>::value);
  const auto da_ = as<T>(da), x_ = as<T>(x), h_ = as<T>(h), h0_ = as<T>(h0);
  auto dw_ih = buffer({4 * H, I}, floats), dw_hh = buffer({4 * H, H}, floats);
  auto dbias = at::zeros({4 * H}, floats);
  const int64_t vectors = ceil_div(I, kLanes<S>) + ceil_div(H, kLanes<S>);
  auto sums = buffer({N > kChunk * P::numbers ? vectors : 0, 4 * H, kLanes<S>}, floats);
  const int64_t shares = std::max<int64_t>(1, ceil_div(4 * H, kLanes<S>));
  const int64_t threads =
      4.0 * N * H * (I + H) < 1e5 ? 1 : std::min<int64_t>(at::get_num_threads(), shares);
  auto columns = buffer({shares, kChunk, kBytes}, floats.dtype(at::kByte));
  auto features = buffer({threads, kChunk, kVectors, kBytes}, floats.dtype(at::kByte));
  Gradients<P> a{data<T>(da_), std::vector<const T*>(N), std::vector<const T*>(N),
                 data<S>(dw_ih), data<S>(dw_hh), data<S>(dbias), data<Vec<S>>(sums),
                 data<typename P::Words>(columns), data<typename P::Words>(features), N, I, H};
  for (const Step& s : walk(sizes, reverse))
    for (int64_t b = 0; b < s.rows; ++b) {
      a.x[s.row + b] = data<T>(x_) + (s.row + b) * I;
      a.before[s.row + b] = b < s.going ? data<T>(h_) + (s.prev + b) * H : data<T>(h0_) + b * H;
    }
  team_of(threads, [&](int64_t id, int64_t count) { gradients(a, id, count); });
  return {dw_ih, dw_hh, dbias};
}

}  // namespace

Three weight_gradients_fast(const at::Tensor& da, const at::Tensor& x, const at::Tensor& h,
                            const at::Tensor& h0, at::IntArrayRef sizes, bool reverse) {
  if (auto found = weight_gradients_amx(da, x, h, h0, sizes, reverse)) return *found;
  if (da.scalar_type() == at::kDouble) return run<Singles<double>>(da, x, h, h0, sizes, reverse);
#ifdef __AVX512BF16__
  if (da.scalar_type() == at::kBFloat16 && kernel() >= Kernel::avx512_bf16)
    return run<Pairs>(da, x, h, h0, sizes, reverse);
#endif
  return run<Singles<float>>(da, x, h, h0, sizes, reverse);
}

}  // namespace rnn
