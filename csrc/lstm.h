// One direction of an LSTM layer as two operators: all steps forward, all steps backward.
//
// Legend    T steps   B sequences   I features of the input   H hidden units
//           N rows: one for every step of every sequence, T * B when all are equally long
//           a the gates' inputs, before sigmoid and tanh   d.. the loss's gradient for ..
//           Gates stand in the order i, f, g, o: columns 0..H, H..2H, 2H..3H, 3H..4H of a (.., 4H)
//
// Forward   for every step t in walking order (0 .. T-1; T-1 .. 0 when `reverse`), with h', c' the
//           state after the step before (at first h0, c0):
//               a = bias + x[t] W_ih^T + h' W_hh^T
//               i, f, o = sigmoid(a_i, a_f, a_o)           g = tanh(a_g)
//               c = f * c' + i * g                         h = o * tanh(c)
//
// Backward  the steps the other way round. da', dc' come from the step just done, which is the one
//           after this step in walking order (at first zero); dh[t], dc[t] come from outside:
//               dh = dh[t] + da' W_hh
//               dc = dc[t] + dc' f' + dh * o * (1 - tanh(c)^2)        f' of the step just done
//               da_i = dc * g * i (1 - i)                  da_f = dc * c' * f (1 - f)
//               da_g = dc * i * (1 - g^2)                  da_o = dh * tanh(c) * o (1 - o)
//               dx[t] = da W_ih
//           After the loop, in an operator of its own (gradients.cpp):
//               dW_ih = da^T x    dW_hh = da^T h'    dbias = sum of da over rows
//
// Rows      are laid out as in a PackedSequence: step t owns sizes[t] rows, right after those of
//           step t-1; row b of a step belongs to sequence b. Longer sequences come first, so sizes
//           never grow, and sizes[0] is B. A sequence's state starts from h0, c0 at the first of
//           its steps that the walk meets, and stays when there are no more.
//
// Tensors   Inputs are only read, results are new. All are of one type: float32, float64 or
//           bfloat16, on CUDA also float16.
//           lstm_forward and lstm_backward always sum a number in the same order, whatever the
//           threads: on one machine their results are the same bits from run to run and for any
//           number of threads. But dx and the weights' gradients may be left to torch's product,
//           which does not promise that.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace rnn {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// -> h (N,H), c (N,H) and gates (N,4H), activated, for lstm_backward; unless `save` only h and what
//    the sequences end with, c (B,H); gates (0,4H)
Three lstm_forward(const at::Tensor& x,     // (N,I)
                   const at::Tensor& w_ih,  // (4H,I)
                   const at::Tensor& bias,  // (4H)
                   const at::Tensor& h0,    // (B,H)
                   const at::Tensor& c0,    // (B,H)
                   const at::Tensor& w_hh,  // (4H,H)
                   at::IntArrayRef sizes, bool reverse, bool save);

// -> da (N,4H), dx (N,I) or, without w_ih, (N,0), dh0 (B,H), dc0 (B,H)
Four lstm_backward(const at::Tensor& dh,                   // (N,H)
                   const std::optional<at::Tensor>& dc,    // (N,H), absent means zero
                   const at::Tensor& gates,                // (N,4H), from lstm_forward
                   const at::Tensor& c,                    // (N,H), from lstm_forward
                   const at::Tensor& c0,                   // (B,H)
                   const std::optional<at::Tensor>& w_ih,  // (4H,I), absent: no dx is wanted
                   const at::Tensor& w_hh,                 // (4H,H)
                   at::IntArrayRef sizes, bool reverse);

// -> dW_ih (4H,I), dW_hh (4H,H), dbias (4H); float32 for bfloat16, but without AMX rounded to
//    bfloat16 first, as torch's own products are. On the CPU only.
Three lstm_weight_gradients(const at::Tensor& da,  // (N,4H), from lstm_backward
                            const at::Tensor& x,   // (N,I)
                            const at::Tensor& h,   // (N,H), from lstm_forward
                            const at::Tensor& h0,  // (B,H)
                            at::IntArrayRef sizes, bool reverse);

// ---- The kernels of the CPU ----

enum class Kernel { simple, vector, avx512_bf16, amx };
Kernel kernel();  // the most that may be used now

Three forward_fast(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                   const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse, bool save);
Four backward_fast(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                   const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                   const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse);
Three weight_gradients_fast(const at::Tensor& da, const at::Tensor& x, const at::Tensor& h,
                            const at::Tensor& h0, at::IntArrayRef sizes, bool reverse);

// ---- Checks that every device's implementation makes first ----

inline void check(const char* name, const at::Tensor& t, const at::Tensor& like,
                  at::IntArrayRef shape) {
  TORCH_CHECK(t.device() == like.device() && t.layout() == at::kStrided, "lstm: ", name,
              " must be a dense tensor on ", like.device(), ", got ", t.device());
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), "lstm: ", name, " must be ",
              like.scalar_type(), " as the others, got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, "lstm: ", name, " must be ", shape, ", got ", t.sizes());
}

inline void check_type(const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 ||
                  (type == at::kHalf && t.is_cuda()),
              "lstm: float32, float64, bfloat16 or, on CUDA, float16 expected, got ", type);
}

// w_hh decides H, the type and the device of all others.
inline int64_t check_w_hh(const at::Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.size(1) >= 1 && w.size(0) % 4 == 0 && w.size(0) / 4 == w.size(1),
              "lstm: w_hh must be (4H, H), got ", w.sizes());
  check_type(w);
  check("w_hh", w, w, w.sizes());
  return w.size(1);
}

inline void check_sizes(at::IntArrayRef sizes, int64_t B, int64_t N) {
  int64_t left = N, before = B;
  TORCH_CHECK(sizes.empty() ? N == 0 : sizes[0] == B, "lstm: sizes must begin with the number of "
              "sequences, ", B, ", got ", sizes);
  for (int64_t n : sizes) {
    TORCH_CHECK(0 <= n && n <= before, "lstm: sizes must never grow nor be negative, got ", n,
                " after ", before);
    TORCH_CHECK(n <= left, "lstm: sizes add up to more than the ", N, " rows of the input");
    left -= before = n;
  }
  TORCH_CHECK(left == 0, "lstm: sizes add up to ", N - left, ", but the input has ", N, " rows");
}

inline void check_forward(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                          const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                          at::IntArrayRef sizes) {
  const int64_t H = check_w_hh(w_hh);
  TORCH_CHECK(x.dim() == 2 && h0.dim() == 2, "lstm: x and h0 must have 2 dimensions, got ",
              x.dim(), " and ", h0.dim());
  const int64_t N = x.size(0), I = x.size(1), B = h0.size(0);
  check("x", x, w_hh, {N, I}), check("w_ih", w_ih, w_hh, {4 * H, I});
  check("bias", bias, w_hh, {4 * H});
  check("h0", h0, w_hh, {B, H}), check("c0", c0, w_hh, {B, H});
  check_sizes(sizes, B, N);
}

inline void check_backward(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                           const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                           const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                           at::IntArrayRef sizes) {
  const int64_t H = check_w_hh(w_hh);
  TORCH_CHECK(gates.dim() == 2 && c0.dim() == 2, "lstm: gates and c0 must have 2 dimensions, got ",
              gates.dim(), " and ", c0.dim());
  const int64_t N = gates.size(0), B = c0.size(0);
  check("dh", dh, w_hh, {N, H}), check("gates", gates, w_hh, {N, 4 * H});
  check("c", c, w_hh, {N, H}), check("c0", c0, w_hh, {B, H});
  if (dc) check("dc", *dc, w_hh, {N, H});
  if (w_ih) {
    TORCH_CHECK(w_ih->dim() == 2, "lstm: w_ih must have 2 dimensions, got ", w_ih->dim());
    check("w_ih", *w_ih, w_hh, {4 * H, w_ih->size(1)});
  }
  check_sizes(sizes, B, N);
}

// By torch's product.
inline at::Tensor find_dx(const at::Tensor& da, const std::optional<at::Tensor>& w_ih) {
  return w_ih ? at::mm(da, *w_ih) : at::empty({da.size(0), 0}, da.options());
}

}  // namespace rnn
