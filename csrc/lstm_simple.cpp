// The operators of lstm.h in their simplest form. Read it right after lstm.h: the fast kernels
// compute the same.
//
// The input's part of the gates' inputs does not depend on the state, so it is one product for all
// steps. What is left for each step is one small product, with W_hh, and one elementwise loop.
#include "lstm.h"
#include "team.h"  // Step, walk: the steps in walking order

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>

namespace rnn {
namespace {

// A copy in memory of its own, row after row.
at::Tensor copy(const at::Tensor& t) { return t.clone(at::MemoryFormat::Contiguous); }

// The rows of one step, of a tensor of all rows (N, ..).
at::Tensor rows(const at::Tensor& t, const Step& s) { return t.narrow(0, s.row, s.rows); }

// The state of the sequences that have this step, of a tensor (B, ..): they are the first ones.
at::Tensor alive(const at::Tensor& t, const Step& s) { return t.narrow(0, 0, s.rows); }

// Calls body(b, u) for every row b of a step and every hidden unit u, on all threads.
template <typename Body> void for_each(int64_t rows, int64_t H, const Body& body) {
  at::parallel_for(0, rows * H, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) body(j / H, j % H);
  });
}

template <typename T> T sigmoid(T a) { return 1 / (1 + std::exp(-a)); }

// One step. gates (rows,4H) holds their inputs a, and becomes i, f, g, o; h and c (rows,H) hold
// h' and c', and become h and c.
template <typename T> void cell(at::Tensor gates_, at::Tensor h_, at::Tensor c_) {
  auto gates = gates_.accessor<T, 2>(), h = h_.accessor<T, 2>(), c = c_.accessor<T, 2>();
  const int64_t H = h_.size(1);
  for_each(h_.size(0), H, [&](int64_t b, int64_t u) {
    T &i = gates[b][u], &f = gates[b][H + u], &g = gates[b][2 * H + u], &o = gates[b][3 * H + u];
    i = sigmoid(i), f = sigmoid(f), g = std::tanh(g), o = sigmoid(o);
    c[b][u] = f * c[b][u] + i * g;
    h[b][u] = o * std::tanh(c[b][u]);
  });
}

// One step backward. gates (rows,4H), c and c' (rows,H) are forward's; dh (rows,H) is complete.
// dc (rows,H) holds dc[t] + dc' f', and becomes dc f, for the step before. Fills da (rows,4H).
template <typename T>
void cell_backward(at::Tensor gates_, at::Tensor c_, at::Tensor c_before_, at::Tensor dh_,
                   at::Tensor dc_, at::Tensor da_) {
  auto gates = gates_.accessor<T, 2>(), c = c_.accessor<T, 2>();
  auto c_before = c_before_.accessor<T, 2>(), dh = dh_.accessor<T, 2>();
  auto dc = dc_.accessor<T, 2>(), da = da_.accessor<T, 2>();
  const int64_t H = c_.size(1);
  for_each(c_.size(0), H, [&](int64_t b, int64_t u) {
    const T i = gates[b][u], f = gates[b][H + u], g = gates[b][2 * H + u], o = gates[b][3 * H + u];
    const T tanh_c = std::tanh(c[b][u]);
    const T d = dc[b][u] + dh[b][u] * o * (1 - tanh_c * tanh_c);
    da[b][u] = d * g * i * (1 - i);
    da[b][H + u] = d * c_before[b][u] * f * (1 - f);
    da[b][2 * H + u] = d * i * (1 - g * g);
    da[b][3 * H + u] = dh[b][u] * tanh_c * o * (1 - o);
    dc[b][u] = d * f;
  });
}

}  // namespace

Three forward_simple(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                     const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                     at::IntArrayRef sizes, bool reverse, bool save) {
  const at::Tensor gates = at::addmm(bias, x, w_ih.t());              // (N,4H)
  const at::Tensor h = at::empty({x.size(0), h0.size(1)}, x.options());  // (N,H)
  const at::Tensor c = save ? at::empty_like(h) : at::Tensor();
  const at::Tensor h_now = copy(h0), c_now = copy(c0);                // (B,H)
  for (const Step& s : walk(sizes, reverse)) {
    rows(gates, s).addmm_(alive(h_now, s), w_hh.t());  // now complete: the gates' inputs
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lstm_forward", [&] {
      cell<scalar_t>(rows(gates, s), alive(h_now, s), alive(c_now, s));
    });
    rows(h, s).copy_(alive(h_now, s));
    if (save) rows(c, s).copy_(alive(c_now, s));
  }
  if (save) return {h, c, gates};
  return {h, c_now, at::empty({0, gates.size(1)}, x.options())};
}

Four backward_simple(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                     const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                     const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                     at::IntArrayRef sizes, bool reverse) {
  const at::Tensor da = at::empty(gates.sizes(), gates.options());  // (N,4H)
  const at::Tensor dh_now = at::zeros(c0.sizes(), c0.options());    // (B,H): da' W_hh
  const at::Tensor dc_now = at::zeros(c0.sizes(), c0.options());    // (B,H): dc' f'
  const std::vector<Step> steps = walk(sizes, reverse);
  for (auto s = steps.rbegin(); s != steps.rend(); ++s) {
    alive(dh_now, *s).add_(rows(dh, *s));
    if (dc) alive(dc_now, *s).add_(rows(*dc, *s));
    // The first `going` rows continue a step, the others start from c0.
    const at::Tensor c_before = at::cat({c.narrow(0, s->prev, s->going),
                                         c0.narrow(0, s->going, s->rows - s->going)});
    AT_DISPATCH_FLOATING_TYPES(dh.scalar_type(), "lstm_backward", [&] {
      cell_backward<scalar_t>(rows(gates, *s), rows(c, *s), c_before, alive(dh_now, *s),
                              alive(dc_now, *s), rows(da, *s));
    });
    alive(dh_now, *s).copy_(at::mm(rows(da, *s), w_hh));
  }
  return {da, find_dx(da, w_ih), dh_now, dc_now};
}

Three weight_gradients_simple(const at::Tensor& da, const at::Tensor& x, const at::Tensor& h,
                              const at::Tensor& h0, at::IntArrayRef sizes, bool reverse) {
  const at::Tensor before = at::empty(h.sizes(), h.options());  // (N,H): h' of every row
  const at::Tensor h_now = copy(h0);                            // (B,H)
  for (const Step& s : walk(sizes, reverse)) {
    rows(before, s).copy_(alive(h_now, s));
    alive(h_now, s).copy_(rows(h, s));
  }
  return {at::mm(da.t(), x), at::mm(da.t(), before), da.sum(0)};
}

}  // namespace rnn
