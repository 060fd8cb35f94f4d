// The operators of lstm.h on the CPU, float32 and float64.
//
// The whole walk over time happens inside one team of threads. W_ih and W_hh are first copied into
// panels, in the order in which the inner loop reads them; but not for a few rows in all, as in
// sampling. A tile, a few rows of the batch x one panel of units, is summed over all of K in vector
// registers and goes through the nonlinearities while still in the nearest cache. The state travels
// from step to step in a small buffer.
#include "lstm.h"
#include "simd.h"
#include "team.h"

#include <ATen/Dispatch.h>

namespace rnn {
namespace {

// ---- The product: a tile of R rows x one panel of V vectors, added to `out` ----

// out[r][v] += sum over k of x[r * stride + k] * w[k][v], all sums in registers, in order of k
template <typename T, int R, int V>
void tile(const T* x, int64_t stride, const Vec<T>* w, int64_t K, Vec<T>* out) {
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = out[r * V + v];
  for (int64_t k = 0; k < K; ++k, w += V)
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = broadcast<T>(x[r * stride + k]);
      for (int v = 0; v < V; ++v) sum[r][v] += value * w[v];
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) out[r * V + v] = sum[r][v];
}

// The same for any number of rows up to kTileRows. R is a template parameter, with one function for
// each number, because only a sum whose place is known to the compiler can stay in a register.
template <int V> constexpr int kTileRows = kRows * 2 / V;
template <typename T, int V, int R = kTileRows<V>>
void product(int64_t rows, const T* x, int64_t stride, const Vec<T>* w, int64_t K, Vec<T>* out) {
  if constexpr (R > 1)
    if (rows < R) return product<T, V, R - 1>(rows, x, stride, w, K, out);
  tile<T, R, V>(x, stride, w, K, out);
}

// The same without panels, for few rows: to copy W takes longer than to read it where it is. For n
// units: out[r][gate][unit] += the dot product of row r of x with row gate * H + unit of w (4H,K)
template <typename T, typename W, int R = kTileRows<4>>
void dots(int64_t rows, const T* x, int64_t stride, const W* w, int64_t K, int64_t H, int64_t n,
          Vec<T>* out) {
  if constexpr (R > 1)
    if (rows < R) return dots<T, W, R - 1>(rows, x, stride, w, K, H, n, out);
  for (int64_t unit = 0; unit < std::min<int64_t>(n, kLanes<T>); ++unit, w += K) {
    Vec<T> sum[R][4] = {};
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

// Cuts rows begin .. end into tiles of at most `most`, equal to within one: 13 = 7 + 6, not 12 + 1.
template <typename Body>
inline void for_tiles(int64_t begin, int64_t end, int64_t most, const Body& body) {
  const int64_t n = end - begin, tiles = (n + most - 1) / most;  // none if end <= begin
  for (int64_t j = 0; j < tiles; ++j) body(begin + n * j / tiles, begin + n * (j + 1) / tiles);
}

// Rows of a buffer, far enough apart that twelve of them do not fall into the same cache set.
template <typename T> int64_t padded(int64_t columns) { return columns + 2 * kLanes<T>; }

// ---- Forward ----

constexpr int64_t kFew = 8;  // for so many rows in all (N) there are no panels

template <typename T, typename W> struct Forward {  // weights of type W
  const T *x, *bias;                          // as in lstm.h
  const W *w_ih, *w_hh;
  T *h, *c, *gates;                           // (N,H), (N,H), (N,4H); gates null: no c either
  Vec<T>* panels;                             // null, or (panels, I + H, 4) vectors of L units
  T *h_now, *c_now;                           // (2, B, padded H), double-buffered; (B,H)
  int64_t B, I, H;
};

template <typename T, typename W>
void forward(const Forward<T, W>& a, const std::vector<Step>& steps, const Share& mine) {
  constexpr int L = kLanes<T>, most = kTileRows<4>;
  const int64_t B = a.B, I = a.I, H = a.H, K = I + H, wide = padded<T>(H);
  for (int64_t p = mine.pack; a.panels && p < mine.pack_end; ++p)
    for (int64_t k0 = 0; k0 < K; k0 += L)  // rows of W become lanes, a few numbers at a time
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t lane = 0; lane < L; ++lane)
          for (int64_t k = k0; k < std::min(K, k0 + L); ++k) {
            const int64_t u = p * L + lane, row = gate * H + u;
            T* to = reinterpret_cast<T*>(a.panels + (p * K + k) * 4 + gate) + lane;
            *to = u >= H ? W(0) : k < I ? a.w_ih[row * I + k] : a.w_hh[row * H + k - I];
          }
  barrier();
  for (size_t t = 0; t < steps.size(); ++t) {
    const Step& s = steps[t];
    const T* before = a.h_now + t % 2 * B * wide;  // every row's h', or h0 if it has not begun
    T* after = a.h_now + (t + 1) % 2 * B * wide;
    for (int64_t p = mine.panel; p < mine.panel_end; ++p)
      for_tiles(mine.row, std::min(mine.row_end, s.rows), most, [&](int64_t b0, int64_t b1) {
        const int64_t rows = b1 - b0, u = p * L, n = H - u;
        const Vec<T>* w = a.panels + p * K * 4;
        Vec<T> sum[most][4];
        for (int64_t r = 0; r < rows; ++r)
          for (int gate = 0; gate < 4; ++gate) sum[r][gate] = load(a.bias + gate * H + u, n);
        if (a.panels) {
          product<T, 4>(rows, a.x + (s.row + b0) * I, I, w, I, sum[0]);
          product<T, 4>(rows, before + b0 * wide, wide, w + I * 4, H, sum[0]);
        } else {
          dots(rows, a.x + (s.row + b0) * I, I, a.w_ih + u * I, I, H, n, sum[0]);
          dots(rows, before + b0 * wide, wide, a.w_hh + u * H, H, H, n, sum[0]);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t b = b0 + r, row = s.row + b;
          Vec<T> gate[4];  // i, f, g, o
          activate<T>(sum[r], gate);
          const Vec<T> c = gate[1] * load(a.c_now + b * H + u, n) + gate[0] * gate[2];
          const Vec<T> h = gate[3] * tanh<T>(c);
          store(a.c_now + b * H + u, c, n);
          store(after + b * wide + u, h, n);
          store(a.h + row * H + u, h, n);
          if (!a.gates) continue;
          store(a.c + row * H + u, c, n);
          for (int j = 0; j < 4; ++j) store(a.gates + (row * 4 + j) * H + u, gate[j], n);
        }
      });
    if (!mine.alone) barrier();
  }
}

// ---- Backward ----

template <typename T> struct Backward {
  const T *dh, *dc, *gates, *c, *c0, *w_hh;  // as in lstm.h; dc may be null
  T *da, *dh0, *dc0;                         // (N,4H), (B,H), (B,H); dc0 carries dc' * f'
  Vec<T>* panels;                            // (panels, 4H, 2) vectors of L units
  Vec<T>* sums;                              // (panels, B, 2): da' W_hh
  T* da_now;                                 // (2, B, padded 4H), double-buffered
  const int64_t* first;                      // (B): the row in which each sequence begins
  int64_t B, H;
};

constexpr int64_t kBlock = 256;  // gate gradients whose rows of W_hh and of da' stay in near caches

template <typename T>
void backward(const Backward<T>& a, const std::vector<Step>& steps, const Share& mine) {
  constexpr int L = kLanes<T>;
  const int64_t B = a.B, H = a.H, wide = padded<T>(4 * H);
  for (int64_t p = mine.pack; p < mine.pack_end; ++p)
    for (int64_t k = 0; k < 4 * H; ++k)
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t u = (p * 2 + v) * L;
        a.panels[(p * 4 * H + k) * 2 + v] = u < H ? load(a.w_hh + k * H + u, H - u) : Vec<T>{};
      }
  barrier();
  const int64_t u0 = mine.panel * 2 * L, u1 = std::min(H, mine.panel_end * 2 * L);
  for (size_t t = steps.size(); t-- > 0;) {
    const Step& s = steps[t];
    const int64_t row_end = std::min(mine.row_end, s.rows);
    const int64_t later = t + 1 < steps.size() ? steps[t + 1].going : 0;  // rows that have a da'
    const T* before = a.da_now + t % 2 * B * wide;
    T* after = a.da_now + (t + 1) % 2 * B * wide;
    for (int64_t k = 0; k < 4 * H; k += kBlock)  // a block of da' stays near for all panels
      for (int64_t p = mine.panel; p < mine.panel_end; ++p)
        for_tiles(mine.row, std::min(row_end, later), kTileRows<2>, [&](int64_t b0, int64_t b1) {
          Vec<T>* sum = a.sums + (p * B + b0) * 2;
          if (k == 0) std::fill(sum, sum + (b1 - b0) * 2, Vec<T>{});
          product<T, 2>(b1 - b0, before + b0 * wide + k, wide, a.panels + (p * 4 * H + k) * 2,
                        std::min<int64_t>(kBlock, 4 * H - k), sum);
        });
    for (int64_t b = mine.row; b < row_end; ++b) {
      const int64_t row = s.row + b;
      const T* c_before = b < s.going ? a.c + (s.prev + b) * H : a.c0 + b * H;
      for (int64_t u = u0; u < u1; u += L) {
        const int64_t n = H - u;
        const T* gates = a.gates + row * 4 * H + u;
        const Vec<T> i = load(gates, n), f = load(gates + H, n);
        const Vec<T> g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
        const Vec<T> tanh_c = tanh<T>(load(a.c + row * H + u, n)), c = load(c_before + u, n);
        const Vec<T> sum = b < later ? a.sums[(u / (2 * L) * B + b) * 2 + u / L % 2] : Vec<T>{};
        const Vec<T> dh = load(a.dh + row * H + u, n) + sum;
        Vec<T> dc = load(a.dc0 + b * H + u, n) + dh * o * (1 - tanh_c * tanh_c);
        if (a.dc) dc += load(a.dc + row * H + u, n);
        store(a.dc0 + b * H + u, dc * f, n);
        const Vec<T> da[4] = {dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g),
                              dh * tanh_c * o * (1 - o)};
        for (int64_t gate = 0; gate < 4; ++gate) {
          store(after + b * wide + gate * H + u, da[gate], n);
          store(a.da + row * 4 * H + gate * H + u, da[gate], n);
        }
      }
    }
    if (!mine.alone) barrier();
  }
  for (int64_t b = mine.row; b < mine.row_end; ++b)  // what its first step hands to h0
    for (int64_t u = u0; u < u1; u += 2 * L) {
      Vec<T> sum[2] = {};
      product<T, 2>(1, a.da + a.first[b] * 4 * H, 0, a.panels + u / (2 * L) * 8 * H, 4 * H, sum);
      for (int64_t v = 0; v < 2 && u + v * L < H; ++v)
        store(a.dh0 + b * H + u + v * L, sum[v], H - u - v * L);
    }
}

// ---- The operators ----

bool is_bf16(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; }

}  // namespace

Three forward_fast(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                   const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse, bool save) {
  const int64_t N = x.size(0), I = x.size(1), B = h0.size(0), H = h0.size(1);
  const bool few = N <= kFew, tiles = !few && bf16_serves(w_hh.options(), B, H);
  // Without tiles, bfloat16 is computed in float32; only the weights are read as they are.
  const auto type = w_hh.scalar_type(), computed = is_bf16(w_hh) && !tiles ? at::kFloat : type;
  const auto like = w_hh.options().dtype(computed);
  auto h = fresh({N, H}, like), c_now = fresh({B, H}, like).copy_(c0);
  auto c = save ? fresh({N, H}, like) : c_now, gates = reused({save ? N : 0, 4 * H}, like);
  if (N == 0) return {h.to(type), c.to(type), gates.to(type)};
  const auto x_ = x.to(computed).contiguous(), bias_ = bias.to(computed).contiguous();
  const auto h0_ = h0.to(computed).contiguous();
  const auto w_ih_ = w_ih.contiguous(), w_hh_ = w_hh.contiguous();
  if (tiles) {
    auto end = forward_bf16(x_, w_ih_, bias_, h0_, c0, w_hh_, sizes, reverse, h, c, gates);
    if (end.defined()) return {h, save ? c : end.to(type), gates};
  }
  auto compute = [&](auto number, auto weight) {
    using T = decltype(number);
    using W = decltype(weight);
    const int64_t panels = (H + kLanes<T> - 1) / kLanes<T>;
    at::Tensor packed = fresh({few ? 0 : panels, I + H, 4 * kLanes<T>}, like);
    at::Tensor h_now = fresh({2, B, padded<T>(H)}, like);
    for (int64_t b = 0; b < 2 * B; ++b)  // both: a sequence may begin at any step
      std::copy_n(h0_.const_data_ptr<T>() + b % B * H, H, h_now.data_ptr<T>() + b * padded<T>(H));
    Forward<T, W> a{x_.const_data_ptr<T>(), bias_.const_data_ptr<T>(), w_ih_.const_data_ptr<W>(),
                    w_hh_.const_data_ptr<W>(), h.data_ptr<T>(), c.data_ptr<T>(),
                    save ? gates.data_ptr<T>() : nullptr,
                    few ? nullptr : reinterpret_cast<Vec<T>*>(packed.data_ptr<T>()),
                    h_now.data_ptr<T>(), c_now.data_ptr<T>(), B, I, H};
    const auto steps = walk(sizes, reverse);
    team(panels, 1, sizes, 4.0 * H * (I + H) * sizeof(T), [&](const Share& mine) {
      forward(a, steps, mine);
    });
  };
  if (type == at::kBFloat16) compute(float{}, at::BFloat16{});
  else if (type == at::kFloat) compute(float{}, float{});
  else compute(double{}, double{});
  return {h.to(type), c.to(type), gates.to(type)};
}

Four backward_fast(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                   const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                   const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse) {
  const int64_t N = gates.size(0), B = c0.size(0), H = c0.size(1);
  const auto like = w_hh.options();
  if (is_bf16(w_hh) && !bf16_serves(like, B, H)) {
    std::optional<at::Tensor> dc_, w_ih_;
    if (dc) dc_ = dc->to(at::kFloat);
    if (w_ih) w_ih_ = w_ih->to(at::kFloat);
    auto [da, dx, dh0, dc0] = backward_fast(dh.to(at::kFloat), dc_, gates.to(at::kFloat),
                                            c.to(at::kFloat), c0.to(at::kFloat), w_ih_,
                                            w_hh.to(at::kFloat), sizes, reverse);
    return {da.to(at::kBFloat16), dx.to(at::kBFloat16), dh0.to(at::kBFloat16),
            dc0.to(at::kBFloat16)};
  }
  auto da = reused({N, 4 * H}, like), dh0 = at::zeros({B, H}, like), dc0 = at::zeros({B, H}, like);
  if (N == 0) return {da, find_dx(da, w_ih), dh0, dc0};
  const auto dh_ = dh.contiguous(), gates_ = gates.contiguous(), c_ = c.contiguous();
  const auto c0_ = c0.contiguous(), w_hh_ = w_hh.contiguous();
  const auto dc_ = dc ? dc->contiguous() : at::Tensor();
  if (bf16_serves(like, B, H)) {
    const auto w_ih_ = w_ih ? w_ih->contiguous() : at::Tensor();
    auto dx = fresh({N, w_ih ? w_ih->size(1) : 0}, like);
    auto dc_now = backward_bf16(dh_, dc_, gates_, c_, c0_, w_ih_, w_hh_, sizes, reverse, da, dx,
                                dh0);
    if (dc_now.defined()) return {da, dx, dh0, dc_now.to(like.dtype())};
  }
  AT_DISPATCH_FLOATING_TYPES(w_hh.scalar_type(), "lstm_backward", [&] {
    using T = scalar_t;
    const int64_t panels = (H + 2 * kLanes<T> - 1) / (2 * kLanes<T>);
    auto packed = fresh({panels, 4 * H, 2 * kLanes<T>}, like);
    auto sums = fresh({panels, B, 2 * kLanes<T>}, like);
    auto da_now = fresh({2, B, padded<T>(4 * H)}, like);
    const auto steps = walk(sizes, reverse);
    const auto first = first_rows(steps, B);
    Backward<T> a{dh_.const_data_ptr<T>(), dc ? dc_.const_data_ptr<T>() : nullptr,
                  gates_.const_data_ptr<T>(), c_.const_data_ptr<T>(), c0_.const_data_ptr<T>(),
                  w_hh_.const_data_ptr<T>(), da.data_ptr<T>(), dh0.data_ptr<T>(),
                  dc0.data_ptr<T>(), reinterpret_cast<Vec<T>*>(packed.data_ptr<T>()),
                  reinterpret_cast<Vec<T>*>(sums.data_ptr<T>()), da_now.data_ptr<T>(),
                  first.data(), B, H};
    team(panels, 1, sizes, 4.0 * H * H * sizeof(T), [&](const Share& mine) {
      backward<T>(a, steps, mine);
    });
  });
  return {da, find_dx(da, w_ih), dh0, dc0};
}

}  // namespace rnn
