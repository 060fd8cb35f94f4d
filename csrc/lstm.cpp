// Names the operators; lstm_cpu.cpp (and, for GPUs, lstm_cuda.cu) bring their implementations.
// torch.ops lets other Python threads run (releases the GIL) while an operator works.
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
