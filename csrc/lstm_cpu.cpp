// The operators of lstm.h on the CPU, in vectors.
//
// The whole walk over time happens inside one team of threads. The weights are first copied into
// panels, in the order in which the inner loop reads them; but not for a few rows in all, as in
// sampling. A tile, a few rows of the batch x one panel, is summed in registers, a block of K at a
// time, and goes through the nonlinearities while still in the nearest cache. The state travels
// from step to step in small buffers.
#include "amx/amx.h"
#include "product.h"
#include "team.h"

namespace rnn {
namespace {

// ---- Forward ----

constexpr int64_t kFew = 8;  // up to N = 8 rows there are no panels; `pays_off` knows this number

// Up to so many sequences, threads share no rows, and the products that do not depend on the state
// are computed for all steps at once: a step then reads W_hh alone.
constexpr int64_t kFewSequences = 2;

constexpr int64_t kBlock = 128;  // words; sums of sums err less than one long sum

// Adds to sums (rows, V) the products of rows of K words, `row` apart, with a panel of V vectors.
template <typename P, typename T>
void add_products(int64_t rows, int64_t V, const typename P::Words* w,
                  Vec<typename P::Sum>* sums, const T* x, int64_t row, int64_t K) {
  for (int64_t k = 0; k < K; k += kBlock)
    product<P>(rows, V, w + k * V, sums, (const typename P::Word*)x + k, row, 1,
               std::min(kBlock, K - k));
}

template <typename P, typename W> struct Forward {  // P: see product.h; weights of type W
  const typename P::Number* x;                      // as in lstm.h, of an even I for pairs
  const W *w_ih, *w_hh;                             // likewise
  const typename P::Sum* bias;
  typename P::Number *h, *c, *gates;  // (N,H), (N,H), (N,4H); gates null: no c either
  typename P::Words* panels;          // null, or (panels of L units, K, 4 gates)
  Vec<typename P::Sum>* x_sums;       // null, or (panels, N, 4 gates): x W_ih^T
  typename P::Number* h_now;          // (2, B, padded H), double-buffered
  typename P::Sum* c_now;             // (B,H)
  int64_t N, B, I, H;
};

// The product without panels, for few rows: copying W would take longer than reading it in place.
// For n units: out[r][gate] += the dot products of row r of x with rows gate * H + unit of w (4H,K)
template <typename T, typename W, int R = kTileRows>
void dots(int64_t rows, const T* x, int64_t stride, const W* w, int64_t K, int64_t H, int64_t n,
          Vec<T>* out) {
  if constexpr (R > 1)
    if (rows < R) return dots<T, W, R - 1>(rows, x, stride, w, K, H, n, out);
  for (int64_t unit = 0; unit < std::min<int64_t>(n, kLanes<T>); ++unit, w += K) {
    Vec<T> sum[R][4];
    for (auto& row : sum)  // `= {}` would be a call of memset
      for (Vec<T>& s : row) s = Vec<T>{};
    auto add = [&](int64_t k, int64_t exist) {
      Vec<T> values[R];
      for (int r = 0; r < R; ++r) values[r] = load(x + r * stride + k, exist);
      for (int gate = 0; gate < 4; ++gate) {
        const Vec<T> weights = load(w + gate * H * K + k, exist);
        for (int r = 0; r < R; ++r) sum[r][gate] += values[r] * weights;
      }
    };
    int64_t k = 0;
    for (; k + kLanes<T> <= K; k += kLanes<T>) add(k, kLanes<T>);
    if (k < K) add(k, K - k);
    for (int r = 0; r < R; ++r)
      for (int gate = 0; gate < 4; ++gate)
        for (int lane = 0; lane < kLanes<T>; ++lane)
          out[r * 4 + gate][unit] += sum[r][gate][lane];
  }
}

// Rows of w (4H,K), in words, become lanes: `to` is a panel from its first word on.
template <typename P, typename W>
void pack(const W* numbers, int64_t K, int64_t H, int64_t u, typename P::Words* to) {
  constexpr int64_t L = kLanes<typename P::Sum>;
  const auto* w = (const std::conditional_t<P::numbers == 1, W, typename P::Word>*)numbers;
  for (int64_t k0 = 0; k0 < K; k0 += L)  // a few words at a time stay in the nearest cache
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t lane = 0; lane < L; ++lane) {
        const auto* from = w + (gate * H + std::min(u + lane, H - 1)) * K;  // beyond H: any number
        auto* lanes = reinterpret_cast<typename P::Word*>(to + gate) + lane;
        for (int64_t k = k0; k < std::min(K, k0 + L); ++k) lanes[k * 4 * L] = from[k];
      }
}

template <typename P, typename W>
void forward(const Forward<P, W>& a, const std::vector<Step>& steps, const Share& mine) {
  using S = typename P::Sum;
  constexpr int L = kLanes<S>, most = kTileRows;
  const int64_t H = a.H, wide = padded<typename P::Number>(H);
  const int64_t K_x = a.I / P::numbers, K_h = ceil_div(H, P::numbers), K = K_x + K_h;  // words
  for (int64_t p = mine.panel; a.panels && p < mine.panel_end; ++p) {
    if (mine.alone && p % mine.count != mine.id) continue;  // another thread packs it
    pack<P>(a.w_ih, K_x, H, p * L, a.panels + p * K * 4);
    pack<P>(a.w_hh, K_h, H, p * L, a.panels + (p * K + K_x) * 4);
  }
  barrier();
  // Few sequences: the input's products for all steps.
  for (int64_t p = mine.panel; a.x_sums && p < mine.panel_end; ++p)
    for_pieces(0, a.N, most, [&](int64_t j0, int64_t j1) {
      auto* sums = a.x_sums + (p * a.N + j0) * 4;
      std::fill_n(sums, (j1 - j0) * 4, Vec<S>{});
      add_products<P>(j1 - j0, 4, a.panels + p * K * 4, sums, a.x + j0 * a.I, K_x, K_x);
    });
  for (size_t t = 0; t < steps.size(); ++t) {
    const Step& s = steps[t];
    const auto* before = a.h_now + t % 2 * a.B * wide;  // every row's h', or h0 if it has not begun
    auto* after = a.h_now + (t + 1) % 2 * a.B * wide;
    for (int64_t q = mine.panel; q < mine.panel_end; ++q) {
      // Odd steps go backwards: the panels that were used last are still in the cache.
      const int64_t p = t % 2 ? mine.panel + mine.panel_end - 1 - q : q;
      const int64_t u = p * L, n = H - u;
      Vec<S> bias[4];
      for (int gate = 0; gate < 4; ++gate) bias[gate] = load(a.bias + gate * H + u, n);
      for_pieces(0, mine.rows(s.rows), most, [&](int64_t j0, int64_t j1) {
        const int64_t rows = j1 - j0, b0 = mine.row + j0 * mine.every;
        const auto *x = a.x + (s.row + b0) * a.I, *h_before = before + b0 * wide;
        Vec<S> sum[most][4];
        for (int64_t r = 0; r < rows; ++r) {
          // Fetch what will be written while the products are computed.
          const int64_t row = s.row + b0 + r * mine.every;
          __builtin_prefetch(a.h + row * H + u, 1);
          for (int gate = 0; gate < 4; ++gate) {
            if (a.gates) __builtin_prefetch(a.gates + (row * 4 + gate) * H + u, 1);
            sum[r][gate] = bias[gate];
            if (a.x_sums) sum[r][gate] += a.x_sums[(p * a.N + row) * 4 + gate];
          }
        }
        if (a.panels) {
          const auto* w = a.panels + p * K * 4;
          if (!a.x_sums) add_products<P>(rows, 4, w, sum[0], x, mine.every * K_x, K_x);
          add_products<P>(rows, 4, w + K_x * 4, sum[0], h_before,
                          mine.every * wide / P::numbers, K_h);
        } else if constexpr (P::numbers == 1) {
          dots(rows, x, mine.every * a.I, a.w_ih + u * a.I, a.I, H, n, sum[0]);
          dots(rows, h_before, mine.every * wide, a.w_hh + u * H, H, H, n, sum[0]);
        }
        // The cell, from complete sums. Compiled twice: with n = L no load or store tests for the
        // end. First every row's c, then every row's h, so that no tanh(c) waits for its own c.
        auto cell = [&](int64_t n) __attribute__((always_inline)) {
          Vec<S> c[most];
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t b = b0 + r * mine.every;
            Vec<S>* gate = sum[r];  // i, f, g, o
            gate[0] = P::sigmoid(gate[0]), gate[1] = P::sigmoid(gate[1]);
            gate[2] = P::tanh(gate[2]), gate[3] = P::sigmoid(gate[3]);
            c[r] = gate[1] * load(a.c_now + b * H + u, n) + gate[0] * gate[2];
            store(a.c_now + b * H + u, c[r], n);
          }
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t b = b0 + r * mine.every, row = s.row + b;
            const Vec<S> h = sum[r][3] * P::tanh(c[r]);
            store(after + b * wide + u, h, n);
            store(a.h + row * H + u, h, n);
            if (!a.gates) continue;
            store(a.c + row * H + u, c[r], n);
            for (int j = 0; j < 4; ++j) store(a.gates + (row * 4 + j) * H + u, sum[r][j], n);
          }
        };
        if (n >= L) cell(L);
        else cell(n);
      });
    }
    if (!mine.alone) barrier();
  }
}

// ---- Backward ----
//
// The product of a step is da [W_hh W_ih]: first the columns of da' W_hh, which the step before
// wants, or h0; then those of dx. Both in vectors, cut into panels of at most kVectors. With few
// sequences dx follows after the walk.

template <typename P> struct Backward {
  const typename P::Number *dh, *dc, *gates, *c, *c0, *w_ih, *w_hh;  // as in lstm.h; dc may be null
  typename P::Number *da, *dx, *dh0;                                 // (N,4H), (N,I), (B,H)
  typename P::Sum* dc_now;     // (B,H): dc' f', at first zero
  typename P::Words* panels;   // (vectors, 4H in words)
  typename P::Number* da_now;  // (2, B, padded 4H), double-buffered
  int64_t N, B, I, H;          // I 0: no dx
};

// Copies columns of the weights, in vectors v0 .. v1, into their panel.
template <typename P> void pack(const Backward<P>& a, int64_t v0, int64_t v1) {
  constexpr int64_t L = kLanes<typename P::Sum>;
  const int64_t units = ceil_div(a.H, L), K = 4 * a.H / P::numbers;
  auto* to = a.panels + v0 * K;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t v = v0; v < v1; ++v, ++to) {
      const int64_t width = v < units ? a.H : a.I, column = (v < units ? v : v - units) * L;
      const auto* w = (v < units ? a.w_hh : a.w_ih) + k * P::numbers * width + column;
      *to = P::words(w, w + width, width - column);
    }
}

// dx of all steps, from da of all steps: this thread's share of the columns.
template <typename P> void input_gradient(const Backward<P>& a, const Share& mine) {
  constexpr int64_t L = kLanes<typename P::Sum>;
  const int64_t units = ceil_div(a.H, L), all = ceil_div(a.I, L), K = 4 * a.H / P::numbers;
  const int64_t begin = units + all * mine.id / mine.count;
  const int64_t end = units + all * (mine.id + 1) / mine.count;
  for_pieces(begin, end, kVectors, [&](int64_t v0, int64_t v1) {
    pack(a, v0, v1);
    for_pieces(0, a.N, kTileRows, [&](int64_t n0, int64_t n1) {
      Vec<typename P::Sum> sums[kTileRows * kVectors] = {}, *sum = sums;
      add_products<P>(n1 - n0, v1 - v0, a.panels + v0 * K, sums, a.da + n0 * 4 * a.H, K, K);
      for (int64_t n = n0; n < n1; ++n)
        for (int64_t column = (v0 - units) * L; column < (v1 - units) * L; column += L)
          store(a.dx + n * a.I + column, *sum++, a.I - column);
    });
  });
}

template <typename P>
void backward(const Backward<P>& a, const std::vector<Step>& steps, const Share& mine) {
  using S = typename P::Sum;
  constexpr int L = kLanes<S>, most = kTileRows;
  const int64_t I = a.I, H = a.H, wide = padded<typename P::Number>(4 * H);
  const int64_t K = 4 * H / P::numbers, units = ceil_div(H, L);  // in vectors; then those of x
  int64_t panel = 0;
  for_pieces(mine.panel, mine.panel_end, kVectors, [&](int64_t v0, int64_t v1) {
    if (!mine.alone || panel++ % mine.count == mine.id) pack(a, v0, v1);  // else another thread
  });
  barrier();
  // The cell, backward, for n units of row b from u on. dh so far is da' W_hh.
  auto cell_backward = [&](const Step& s, int64_t b, int64_t u, int64_t n, Vec<S> dh,
                           typename P::Number* after) __attribute__((always_inline)) {
    const int64_t row = s.row + b;
    const auto* c_row = b < s.going ? a.c + (s.prev + b) * H : a.c0 + b * H;
    const auto* gates = a.gates + row * 4 * H + u;
    const Vec<S> i = load(gates, n), f = load(gates + H, n);
    const Vec<S> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
    const Vec<S> tanh_c = P::tanh(load(a.c + row * H + u, n)), c_before = load(c_row + u, n);
    dh += load(a.dh + row * H + u, n);
    Vec<S> dc = load(a.dc_now + b * H + u, n) + dh * o * (1 - tanh_c * tanh_c);
    if (a.dc) dc += load(a.dc + row * H + u, n);
    store(a.dc_now + b * H + u, dc * f, n);
    const Vec<S> da[4] = {dc * g * i * (1 - i), dc * c_before * f * (1 - f),
                          dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)};
    for (int64_t gate = 0; gate < 4; ++gate) {
      store(after + b * wide + gate * H + u, da[gate], n);
      store(a.da + (row * 4 + gate) * H + u, da[gate], n);
    }
  };
  const Step nothing{0, 0, 0, 0};
  for (int64_t t = steps.size(); t-- >= 0;) {  // the last round, -1, is for what step 0 hands on
    const Step& s = t >= 0 ? steps[t] : nothing;
    const Step& later = t + 1 < int64_t(steps.size()) ? steps[t + 1] : nothing;
    const auto* before = a.da_now + (t + 1) % 2 * a.B * wide;
    auto* after = a.da_now + (t + 2) % 2 * a.B * wide;
    for_pieces(mine.panel, mine.panel_end, kVectors, [&](int64_t v0, int64_t v1) {
      for_pieces(0, mine.rows(std::max(s.rows, later.rows)), most, [&](int64_t j0, int64_t j1) {
        const int64_t rows = std::min(j1, mine.rows(later.rows)) - j0, V = v1 - v0;
        const int64_t b0 = mine.row + j0 * mine.every;
        for (int64_t b = b0; b < std::min(s.rows, b0 + (j1 - j0) * mine.every); b += mine.every)
          for (int64_t u = v0 * L; u < std::min(v1, units) * L; u += L) {  // fetch for the cell
            const int64_t row = s.row + b;
            for (int64_t gate = 0; gate < 4; ++gate) {
              __builtin_prefetch(a.gates + (row * 4 + gate) * H + u);
              __builtin_prefetch(a.da + (row * 4 + gate) * H + u, 1);
            }
            __builtin_prefetch(a.c + row * H + u), __builtin_prefetch(a.dh + row * H + u);
          }
        Vec<S> sum[most * kVectors] = {};
        if (rows > 0)
          add_products<P>(rows, V, a.panels + v0 * K, sum, before + b0 * wide,
                          mine.every * wide / P::numbers, K);
        for (int64_t r = 0; r < j1 - j0; ++r)
          for (int64_t v = v0; v < v1; ++v) {
            const int64_t b = b0 + r * mine.every, u = v * L, column = u - units * L;
            const Vec<S> from_later = sum[r * V + v - v0];
            if (v >= units) {
              if (b < later.rows)
                store(a.dx + (later.row + b) * I + column, from_later, I - column);
              continue;
            }
            if (later.going <= b && b < later.rows) store(a.dh0 + b * H + u, from_later, H - u);
            if (b >= s.rows) continue;
            const Vec<S> dh = b < later.going ? from_later : Vec<S>{};
            if (u + L <= H) cell_backward(s, b, u, L, dh, after);
            else cell_backward(s, b, u, H - u, dh, after);
          }
      });
    });
    if (!mine.alone) barrier();
  }
  if (a.B <= kFewSequences) input_gradient(a, mine);
}

// ---- The operators ----

// Pairs of bfloat16 want an even number of columns.
template <typename P> at::Tensor whole_words(const at::Tensor& t) {
  return (t.size(1) % P::numbers ? at::constant_pad_nd(t, {0, 1}) : t).contiguous();
}

template <typename P, typename W = typename P::Number>
Three run_forward(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                  const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                  at::IntArrayRef sizes, bool reverse, bool save) {
  using T = typename P::Number;
  using S = typename P::Sum;
  const auto type = c10::CppTypeToScalarType<T>::value;
  const auto sum_type = c10::CppTypeToScalarType<S>::value;
  const auto like = x.options().dtype(type), floats = x.options().dtype(sum_type);
  const int64_t N = x.size(0), B = h0.size(0), H = h0.size(1), wide = padded<T>(H);
  const bool few = N <= kFew && P::numbers == 1;
  const int64_t panels = ceil_div(H, kLanes<S>);
  auto h = buffer({N, H}, like), c_now = buffer({B, H}, floats).copy_(c0);
  auto c = save ? buffer({N, H}, like) : c_now, gates = buffer({save ? N : 0, 4 * H}, like);
  const auto x_ = whole_words<P>(x.to(type)), bias_ = as<S>(bias);
  const auto w_ih_ = whole_words<P>(w_ih), w_hh_ = whole_words<P>(w_hh);
  const int64_t I = x_.size(1), K = (I + w_hh_.size(1)) / P::numbers;
  auto packed = buffer({few ? 0 : panels, K, 4 * kBytes}, like.dtype(at::kByte));
  const bool x_first = !few && B <= kFewSequences;
  auto x_sums = buffer({x_first ? panels : 0, N, 4 * kLanes<S>}, floats);
  auto h_now = at::zeros({2, B, wide}, like);
  h_now.narrow(2, 0, H).copy_(h0);  // both: a sequence may begin at any step
  Forward<P, W> a{data<T>(x_), data<W>(w_ih_), data<W>(w_hh_), data<S>(bias_), data<T>(h),
                  save ? data<T>(c) : nullptr, save ? data<T>(gates) : nullptr,
                  few ? nullptr : data<typename P::Words>(packed),
                  x_first ? data<Vec<S>>(x_sums) : nullptr, data<T>(h_now), data<S>(c_now),
                  N, B, I, H};
  const auto steps = walk(sizes, reverse);
  team(panels, B, 4.0 * H * K * sizeof(typename P::Word),
       [&](const Share& mine) { forward(a, steps, mine); });
  return {h, c.to(type), gates};
}

template <typename P>
Four run_backward(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                  const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                  const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                  at::IntArrayRef sizes, bool reverse) {
  using T = typename P::Number;
  using S = typename P::Sum;
  const auto type = c10::CppTypeToScalarType<T>::value;
  const auto sum_type = c10::CppTypeToScalarType<S>::value;
  const auto like = dh.options().dtype(type), floats = like.dtype(sum_type);
  const int64_t N = dh.size(0), B = c0.size(0), H = c0.size(1), I = w_ih ? w_ih->size(1) : 0;
  const int64_t units = ceil_div(H, kLanes<S>), vectors = units + ceil_div(I, kLanes<S>);
  const int64_t K = 4 * H / P::numbers;
  auto da = buffer({N, 4 * H}, like), dx = buffer({N, I}, like);
  auto dh0 = at::zeros({B, H}, like), dc_now = at::zeros({B, H}, floats);
  const auto dh_ = as<T>(dh), gates_ = as<T>(gates), c_ = as<T>(c), c0_ = as<T>(c0);
  const auto w_hh_ = as<T>(w_hh), w_ih_ = w_ih ? as<T>(*w_ih) : w_hh_, dc_ = dc ? as<T>(*dc) : dh_;
  auto packed = buffer({vectors, K, kBytes}, like.dtype(at::kByte));
  auto da_now = buffer({2, B, padded<T>(4 * H)}, like);
  Backward<P> a{data<T>(dh_), dc ? data<T>(dc_) : nullptr, data<T>(gates_), data<T>(c_),
                data<T>(c0_), w_ih ? data<T>(w_ih_) : nullptr, data<T>(w_hh_), data<T>(da),
                data<T>(dx), data<T>(dh0), data<S>(dc_now), data<typename P::Words>(packed),
                data<T>(da_now), N, B, I, H};
  const auto steps = walk(sizes, reverse);
  team(B <= kFewSequences ? units : vectors, B, 4.0 * H * (H + I) * sizeof(T),
       [&](const Share& mine) { backward(a, steps, mine); });
  return {da, dx, dh0, dc_now.to(type)};
}

template <typename... Tensors> auto all_to(at::ScalarType type, const Tensors&... tensors) {
  return std::tuple(tensors.to(type)...);
}

}  // namespace

Three forward_fast(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                   const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse, bool save) {
  auto run = [&](auto compute) {
    return compute(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, save);
  };
  if (x.size(0) > kFew)
    if (auto found = run(forward_amx)) return *found;
  if (w_hh.scalar_type() == at::kDouble) return run(run_forward<Singles<double>>);
  if (w_hh.scalar_type() == at::kFloat) return run(run_forward<Singles<float>>);
#ifdef __AVX512BF16__
  if (kernel() >= Kernel::avx512_bf16 && x.size(0) > kFew) return run(run_forward<Pairs>);
#endif
  auto [h, c, gates] = run(run_forward<Singles<float>, at::BFloat16>);  // in float32
  return all_to(at::kBFloat16, h, c, gates);
}

Four backward_fast(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                   const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                   const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse) {
  auto run = [&](auto compute) {
    return compute(dh, dc, gates, c, c0, w_ih, w_hh, sizes, reverse);
  };
  if (auto found = run(backward_amx)) return *found;
  if (w_hh.scalar_type() == at::kDouble) return run(run_backward<Singles<double>>);
#ifdef __AVX512BF16__
  if (w_hh.scalar_type() == at::kBFloat16 && kernel() >= Kernel::avx512_bf16)
    return run(run_backward<Pairs>);
#endif
  auto [da, dx, dh0, dc0] = run(run_backward<Singles<float>>);
  return all_to(w_hh.scalar_type(), da, dx, dh0, dc0);
}

}  // namespace rnn
