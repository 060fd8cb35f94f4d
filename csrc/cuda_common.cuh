// What both forms of lstm_cuda.cu share: the equations of lstm.h for one unit, the walk over time.
#pragma once
#include "lstm.h"

#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace rnn {
namespace {

// ---- One sequence, one unit, one step: the equations of lstm.h ----

template <typename F> __device__ F sigmoid(F a) { return 1 / (1 + exp(-a)); }

// a: the sums, becomes the gates i, f, g, o. c: c', becomes c. Returns h.
template <typename F> __device__ F cell(F (&a)[4], F& c) {
  a[0] = sigmoid(a[0]), a[1] = sigmoid(a[1]), a[2] = tanh(a[2]), a[3] = sigmoid(a[3]);
  c = a[1] * c + a[0] * a[2];
  return a[3] * tanh(c);
}

// gate: i, f, g, o, becomes da. dc: dc[t] + dc' f', becomes dc f, for the step before.
template <typename F> __device__ void cell_backward(F (&gate)[4], F c, F c_before, F dh, F& dc) {
  const F i = gate[0], f = gate[1], g = gate[2], o = gate[3], tanh_c = tanh(c);
  dc += dh * o * (1 - tanh_c * tanh_c);
  gate[0] = dc * g * i * (1 - i), gate[1] = dc * c_before * f * (1 - f);
  gate[2] = dc * i * (1 - g * g), gate[3] = dh * tanh_c * o * (1 - o);
  dc *= f;
}

// ---- The walk over time ----

// A step: its number, how many rows it has, and the first of them.
struct Place {
  int64_t t, rows, row;
};

// The step right after (by = 1) or right before (by = -1) a place; it has so many rows.
__host__ __device__ inline Place neighbour(Place p, int by, int64_t rows) {
  return {p.t + by, rows, by > 0 ? p.row + p.rows : p.row - rows};
}

// The place outside, where a walk over T steps of N rows begins.
__host__ __device__ inline Place outside(int64_t T, int64_t N, int by) {
  return by > 0 ? Place{-1, 0, 0} : Place{T, 0, N};
}

struct Problem {  // what the launches of both forms need to know
  at::IntArrayRef sizes;
  int64_t B, H, N, T;  // T without steps that have no rows
  bool reverse;
  cudaStream_t stream;

  Problem(at::IntArrayRef sizes, int64_t B, int64_t H, int64_t N, bool reverse)
      : sizes(sizes), B(B), H(H), N(N), T(std::count_if(sizes.begin(), sizes.end(), [](int64_t n) {
          return n > 0;
        })), reverse(reverse), stream(c10::cuda::getCurrentCUDAStream()) {}

  int64_t rows(int64_t t) const { return 0 <= t && t < T ? sizes[t] : 0; }
  Place next(Place p, int by) const { return neighbour(p, by, rows(p.t + by)); }
};

}  // namespace
}  // namespace rnn
