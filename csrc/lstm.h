// One direction of an LSTM layer as three operators: all steps forward, all steps backward, and the
// gradients of the weights. This file says what they compute; lstm_simple.cpp is the shortest code
// that does it, and is read next.
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
//           After the loop, in an operator of its own:
//               dW_ih = da^T x    dW_hh = da^T h'    dbias = sum of da over rows
//
// Rows      are laid out as in a PackedSequence: step t owns sizes[t] rows, right after those of
//           step t-1; row b of a step belongs to sequence b. Longer sequences come first, so sizes
//           never grow, and sizes[0] is B. A sequence's state starts from h0, c0 at the first of
//           its steps that the walk meets, and stays when there are no more.
//
// Tensors   Inputs are only read, results are new. All are of one type: float32, float64 or
//           bfloat16, on CUDA also float16. Numbers are always summed in the same order: on one
//           machine results are the same bits from run to run and for any number of threads. But
//           the kernel `simple` and the CUDA kernels leave products to torch, which does not
//           promise that.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace rnn {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// ---- What the three operators take and return ----

// -> h (N,H), c (N,H) and gates (N,4H), activated, for lstm_backward; unless `save` only h and what
//    the sequences end with, c (B,H); gates (0,4H)
using LstmForward = Three(const at::Tensor& x,     // (N,I)
                          const at::Tensor& w_ih,  // (4H,I)
                          const at::Tensor& bias,  // (4H)
                          const at::Tensor& h0,    // (B,H)
                          const at::Tensor& c0,    // (B,H)
                          const at::Tensor& w_hh,  // (4H,H)
                          at::IntArrayRef sizes, bool reverse, bool save);

// -> da (N,4H), dx (N,I) or, without w_ih, (N,0), dh0 (B,H), dc0 (B,H)
using LstmBackward = Four(const at::Tensor& dh,                   // (N,H)
                          const std::optional<at::Tensor>& dc,    // (N,H), absent means zero
                          const at::Tensor& gates,                // (N,4H), from lstm_forward
                          const at::Tensor& c,                    // (N,H), from lstm_forward
                          const at::Tensor& c0,                   // (B,H)
                          const std::optional<at::Tensor>& w_ih,  // (4H,I), absent: no dx is wanted
                          const at::Tensor& w_hh,                 // (4H,H)
                          at::IntArrayRef sizes, bool reverse);

// -> dW_ih (4H,I), dW_hh (4H,H), dbias (4H); float32 for bfloat16. On the CPU only.
using LstmWeightGradients = Three(const at::Tensor& da,  // (N,4H), from lstm_backward
                                  const at::Tensor& x,   // (N,I)
                                  const at::Tensor& h,   // (N,H), from lstm_forward
                                  const at::Tensor& h0,  // (B,H)
                                  at::IntArrayRef sizes, bool reverse);

// ---- Who computes them. lstm.cpp checks the arguments and chooses simple or fast; the functions
// ---- called fast choose among the other kernels

LstmForward forward_simple, forward_fast;  // lstm_simple.cpp, lstm_cpu.cpp
LstmBackward backward_simple, backward_fast;
LstmWeightGradients weight_gradients_simple, weight_gradients_fast;  // fast: gradients.cpp

// The kernels for the CPU; each may also use what those before it use.
//   simple       lstm_simple.cpp, on any CPU; not for bfloat16, which `vector` computes
//   vector       vectors of float32 or float64; bfloat16 is computed in float32
//   avx512_bf16  products of bfloat16 pairs
//   amx          products of bfloat16 tiles, for float32 too
enum class Kernel { simple, vector, avx512_bf16, amx };
Kernel kernel();    // the best one that may be used now and that this CPU can run
bool persistent();  // the same for GPUs: the persistent form, not the stepwise one

// Raise an error that says what does not fit.
void check_forward(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                   const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                   at::IntArrayRef sizes);
void check_backward(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                    const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                    const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                    at::IntArrayRef sizes);

// While this lives, torch's products keep the types that they are given: autocast has done its part
// before the operators are called, and would cast what they compute in float32 again.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// By torch's product.
inline at::Tensor find_dx(const at::Tensor& da, const std::optional<at::Tensor>& w_ih) {
  return w_ih ? at::mm(da, *w_ih) : at::empty({da.size(0), 0}, da.options());
}

}  // namespace rnn
