// The operators of lstm.h on CUDA: float32, float64, float16 and bfloat16, in two forms.
//
// Both start with the input's part of the sums, for all steps in one product:
//     gates = bias + x W_ih^T, (N,4H); each step adds its W_hh h' to its rows and activates them.
//
// steps        per step one product, of torch (cuBLAS), and one kernel for all that is elementwise.
//              For any size. This file.
// persistent   one launch for all steps: cuda_persistent.cuh. Only with RNN_KERNEL=persistent, and
//              then an error for sizes that do not fit.
//
// Numbers      The 16-bit types are types of storage: of gates, h and what the products read. Sums
//              and nonlinearities are float32; so are c and dc as long as they travel from step to
//              step. The c (N,H) kept for backward is rounded to the 16-bit type. The form `steps`
//              rounds the sums too, since torch's product does.
//              No floating-point atomics, every sum in a fixed order: the same bits every time.
// Streams      All work goes to the caller's current stream, nothing waits for it, and all that a
//              kernel needs to know of `sizes` is in its arguments. So calls can be captured into a
//              CUDA graph.
#include "lstm.h"
#include "cuda_common.cuh"
#include "cuda_persistent.cuh"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <type_traits>

namespace rnn {
namespace {

// ---- The form `steps` ----

constexpr int kStepThreads = 256;
dim3 grid(int64_t count) { return (count + kStepThreads - 1) / kStepThreads; }

// One thread per row of the step and unit. a: the sums (rows,4H), become the gates. c_now (B,H) and
// h_now (B,H): the state, before and after. c and a stay unwritten in inference: c is null.
template <typename T, typename F = at::opmath_type<T>>
__global__ void step_forward(int64_t count, int64_t H, T* a, F* c_now, T* h_now, T* h, T* c) {
  const int64_t j = blockIdx.x * int64_t(kStepThreads) + threadIdx.x;
  if (j >= count) return;
  T* gates = a + j / H * 4 * H + j % H;
  F gate[4];
  for (int k = 0; k < 4; ++k) gate[k] = gates[k * H];
  F now = c_now[j];
  h_now[j] = h[j] = cell(gate, now);
  c_now[j] = now;
  if (!c) return;
  c[j] = now;
  for (int k = 0; k < 4; ++k) gates[k * H] = gate[k];
}

// sum: da' W_hh (rows,H). dc_now (B,H): dc' f', before and after. da_now (B,4H): da of this step.
// c_before: the `going` rows of c that the first rows go on from; the other rows go on from c0.
template <typename T, typename F = at::opmath_type<T>>
__global__ void step_backward(int64_t count, int64_t H, const T* dh, const T* dc, const T* gates,
                              const T* c, const T* c_before, int64_t going, const T* c0,
                              const T* sum, F* dc_now, T* da_now, T* da) {
  const int64_t j = blockIdx.x * int64_t(kStepThreads) + threadIdx.x;
  if (j >= count) return;
  const int64_t first = j / H * 4 * H + j % H;
  F gate[4];
  for (int k = 0; k < 4; ++k) gate[k] = gates[first + k * H];
  F now = dc_now[j] + (dc ? F(dc[j]) : F(0));
  const F before = j < going * H ? c_before[j] : c0[j];
  cell_backward<F>(gate, c[j], before, F(dh[j]) + F(sum[j]), now);
  dc_now[j] = now;
  for (int k = 0; k < 4; ++k) da_now[first + k * H] = da[first + k * H] = gate[k];
}

// gates: the input's part of the sums. c: (N,H), or undefined in inference. c_now: float32 (B,H)
template <typename T>
void forward_steps(const Problem& p, const at::Tensor& h0, const at::Tensor& w_hh,
                      const at::Tensor& gates, const at::Tensor& h, const at::Tensor& c,
                      const at::Tensor& c_now) {
  using F = at::opmath_type<T>;
  const at::Tensor h_now = h0.clone(at::MemoryFormat::Contiguous), w = w_hh.t();
  const int by = p.reverse ? -1 : 1;
  Place step = p.next(outside(p.T, p.N, by), by);
  for (int64_t s = 0; s < p.T; ++s, step = p.next(step, by)) {
    at::Tensor a = gates.narrow(0, step.row, step.rows);
    a.addmm_(h_now.narrow(0, 0, step.rows), w);
    const int64_t count = step.rows * p.H, row = step.row * p.H;
    step_forward<T><<<grid(count), kStepThreads, 0, p.stream>>>(
        count, p.H, a.data_ptr<T>(), c_now.data_ptr<F>(), h_now.data_ptr<T>(),
        h.data_ptr<T>() + row, c.defined() ? c.data_ptr<T>() + row : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// da_now: (B,4H), at first zero, at the end the da of every sequence's first step. dc_now: likewise
// dc * f, float32 (B,H)
template <typename T>
void backward_steps(const Problem& p, const at::Tensor& dh, const at::Tensor& dc,
                       const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                       const at::Tensor& w_hh, const at::Tensor& da, const at::Tensor& da_now,
                       const at::Tensor& dc_now) {
  using F = at::opmath_type<T>;
  at::Tensor sums = at::empty_like(c0);
  const int by = p.reverse ? 1 : -1;
  Place step = p.next(outside(p.T, p.N, by), by);
  for (int64_t s = 0; s < p.T; ++s) {
    const Place before = p.next(step, by);
    at::Tensor sum = sums.narrow(0, 0, step.rows);
    at::mm_out(sum, da_now.narrow(0, 0, step.rows), w_hh);
    const int64_t count = step.rows * p.H, row = step.row * p.H;
    step_backward<T><<<grid(count), kStepThreads, 0, p.stream>>>(
        count, p.H, dh.const_data_ptr<T>() + row,
        dc.defined() ? dc.const_data_ptr<T>() + row : nullptr, gates.const_data_ptr<T>() + 4 * row,
        c.const_data_ptr<T>() + row, c.const_data_ptr<T>() + before.row * p.H, before.rows,
        c0.const_data_ptr<T>(), sum.const_data_ptr<T>(), dc_now.data_ptr<F>(),
        da_now.data_ptr<T>(), da.data_ptr<T>() + 4 * row);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    step = before;
  }
}

// ---- The operators ----

constexpr char kNoFit[] = "RNN_KERNEL=persistent does not fit this GPU for B=";

Three forward_cuda(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                   const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse, bool save) {
  check_forward(x, w_ih, bias, h0, c0, w_hh, sizes);
  const NoAutocast here;
  const int64_t N = x.size(0), B = h0.size(0), H = h0.size(1);
  const c10::cuda::CUDAGuard guard(w_hh.device());
  const auto like = w_hh.options();
  const at::Tensor h = at::empty({N, H}, like), c = at::empty({save ? N : B, H}, like);
  const at::Tensor none = at::empty({0, 4 * H}, like);
  if (N == 0) return {h, save ? c : c0.clone(at::MemoryFormat::Contiguous), none};
  const Problem p(sizes, B, H, N, reverse);
  const at::Tensor gates = at::addmm(bias, x, w_ih.t());  // (N,4H)
  const at::Tensor c0_ = c0.contiguous(), w_hh_ = w_hh.contiguous();
  const auto type = w_hh.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "lstm_forward", [&] {
    using T = scalar_t;
    if (persistent()) {
      bool fits = false;
      if constexpr (!std::is_same_v<T, double>)
        fits = try_persistent_forward<T>(p, h0, c0_, w_hh_, gates, h, c, save);
      TORCH_CHECK(fits, kNoFit, B, ", H=", H, " in ", type);
      return;
    }
    const at::Tensor c_now = at::empty({B, H}, like.dtype(at::toOpMathType(type))).copy_(c0);
    forward_steps<T>(p, h0, w_hh_, gates, h, save ? c : at::Tensor(), c_now);
    if (!save) c.copy_(c_now);
  });
  return {h, c, save ? gates : none};
}

Four backward_cuda(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                   const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                   const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse) {
  check_backward(dh, dc, gates, c, c0, w_ih, w_hh, sizes);
  const NoAutocast here;
  const int64_t N = gates.size(0), B = c0.size(0), H = c0.size(1);
  const c10::cuda::CUDAGuard guard(w_hh.device());
  const auto like = w_hh.options();
  const at::Tensor da = at::empty({N, 4 * H}, like), dc0 = at::zeros({B, H}, like);
  if (N == 0) return {da, find_dx(da, w_ih), at::zeros({B, H}, like), dc0};
  const Problem p(sizes, B, H, N, reverse);
  const at::Tensor dh_ = dh.contiguous(), dc_ = dc ? dc->contiguous() : at::Tensor();
  const at::Tensor gates_ = gates.contiguous(), c_ = c.contiguous(), c0_ = c0.contiguous();
  const at::Tensor w_hh_ = w_hh.contiguous();
  const at::Tensor da_first = at::zeros({B, 4 * H}, like);
  const auto type = w_hh.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "lstm_backward", [&] {
    using T = scalar_t;
    if (persistent()) {
      bool fits = false;
      if constexpr (!std::is_same_v<T, double>)
        fits = try_persistent_backward<T>(p, dh_, dc_, gates_, c_, c0_, w_hh_, da, da_first, dc0);
      TORCH_CHECK(fits, kNoFit, B, ", H=", H, " in ", type);
      return;
    }
    const at::Tensor dc_now = at::zeros({B, H}, like.dtype(at::toOpMathType(type)));
    backward_steps<T>(p, dh_, dc_, gates_, c_, c0_, w_hh_, da, da_first, dc_now);
    dc0.copy_(dc_now);
  });
  return {da, find_dx(da, w_ih), at::mm(da_first, w_hh_), dc0};
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn, CUDA, m) {
  m.impl("lstm_forward", forward_cuda);
  m.impl("lstm_backward", backward_cuda);
}

}  // namespace rnn
