// Names the operators; lstm_cpu.cpp (and, for GPUs, lstm_cuda.cu) bring their implementations.
// torch.ops lets other Python threads run (releases the GIL) while an operator works.
#include "lstm.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/library.h>

TORCH_LIBRARY(rnn, m) {
  m.def("lstm_forward(Tensor x, Tensor w_ih, Tensor bias, Tensor h0, Tensor c0, Tensor w_hh, "
        "int[] sizes, bool reverse, bool save) -> (Tensor, Tensor, Tensor)");
  m.def("lstm_backward(Tensor dh, Tensor? dc, Tensor gates, Tensor c, Tensor c0, Tensor? w_ih, "
        "Tensor w_hh, int[] sizes, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("lstm_weight_gradients(Tensor da, Tensor x, Tensor h, Tensor h0, int[] sizes, "
        "bool reverse) -> (Tensor, Tensor, Tensor)");
}

namespace rnn {

// What stands here until the other branch's version replaces it.
Kernel kernel() {
  const char* name = std::getenv("RNN_KERNEL");
  if (!name) name = std::getenv("RNN_CPU");
  const std::string limit = name ? name : "";
  if (limit == "simple") return Kernel::simple;
  if (limit == "vector" || limit == "float32") return Kernel::vector;
  if (limit == "avx512_bf16") return Kernel::avx512_bf16;
#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__))
  static const bool has_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  if (has_amx) return Kernel::amx;
#endif
  return Kernel::avx512_bf16;
}

Three checked_forward(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                      const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                      at::IntArrayRef sizes, bool reverse, bool save) {
  check_forward(x, w_ih, bias, h0, c0, w_hh, sizes);
  return forward_fast(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, save);
}
Four checked_backward(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                      const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                      const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                      at::IntArrayRef sizes, bool reverse) {
  check_backward(dh, dc, gates, c, c0, w_ih, w_hh, sizes);
  return backward_fast(dh, dc, gates, c, c0, w_ih, w_hh, sizes, reverse);
}
Three checked_weight_gradients(const at::Tensor& da, const at::Tensor& x, const at::Tensor& h,
                               const at::Tensor& h0, at::IntArrayRef sizes, bool reverse) {
  TORCH_CHECK(x.dim() == 2 && h0.dim() == 2, "lstm: x and h0 must have 2 dimensions, got ",
              x.dim(), " and ", h0.dim());
  const int64_t N = x.size(0), I = x.size(1), B = h0.size(0), H = h0.size(1);
  check_type(da);
  check("da", da, da, {N, 4 * H}), check("x", x, da, {N, I});
  check("h", h, da, {N, H}), check("h0", h0, da, {B, H});
  check_sizes(sizes, B, N);
  return weight_gradients_fast(da, x, h, h0, sizes, reverse);
}

TORCH_LIBRARY_IMPL(rnn, CPU, m) {
  m.impl("lstm_forward", checked_forward);
  m.impl("lstm_backward", checked_backward);
  m.impl("lstm_weight_gradients", checked_weight_gradients);
}

}  // namespace rnn

// Derivatives are in __init__.py. A gradient that is asked of an operator itself is an error:
// without this it would be zero, in silence.
TORCH_LIBRARY_IMPL(rnn, Autograd, m) {
  for (const char* name : {"lstm_forward", "lstm_backward", "lstm_weight_gradients"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

// A Python module with nothing inside: importing it loads this library, which registers the
// operators. A library compiled for another CPU must say so here, rather than crash in the first
// product. (AMX is asked for at run time, see tiles.h.)
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#define NEEDS(feature) \
  TORCH_CHECK(__builtin_cpu_supports(feature), "compiled for a CPU with " feature)
#ifdef __AVX2__
  NEEDS("avx2");
#endif
#ifdef __FMA__
  NEEDS("fma");
#endif
#ifdef __BMI2__
  NEEDS("bmi2");
#endif
#ifdef __AVX512F__
  NEEDS("avx512f");
#endif
#ifdef __AVX512BW__
  NEEDS("avx512bw");
#endif
#ifdef __AVX512DQ__
  NEEDS("avx512dq");
#endif
#ifdef __AVX512VL__
  NEEDS("avx512vl");
#endif
#ifdef __AVX512VBMI2__
  NEEDS("avx512vbmi2");
#endif
#ifdef __AVX512BF16__
  NEEDS("avx512bf16");
#endif
}
