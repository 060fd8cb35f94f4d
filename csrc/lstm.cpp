// Names the operators of lstm.h, checks their arguments and chooses the kernel that computes them.
// torch.ops lets other Python threads run (releases the GIL) while an operator works.
#include "lstm.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnn {
namespace {

// ---- The choice of kernel ----

bool has_amx() {
#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__))  // the latter: old clang
  // Linux lets a process use the tile registers once it has asked.
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// The best kernel of this library that this CPU can run.
Kernel best() {
#ifdef __AVX512BF16__
  static const Kernel best = has_amx() ? Kernel::amx : Kernel::avx512_bf16;
  return best;
#else
  return Kernel::vector;
#endif
}

bool has_gpu() {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rnn::lstm_forward", "");
  return op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) && at::hasCUDA();
}

std::atomic<Kernel> cpu_kernel = best();
std::atomic<bool> gpu_persistent = false;

// A name, what it needs, whether that is here, and what it chooses.
struct Choice {
  std::string name, needs;
  bool here;
  Kernel cpu;
  bool persistent = false;
};

std::vector<Choice> choices() {
  const Kernel most = best();
  const bool gpu = has_gpu();
  return {{"", "nothing", true, most},
          {"simple", "nothing", true, Kernel::simple},
          {"vector", "nothing", true, Kernel::vector},
          {"avx512_bf16", "AVX-512 BF16 in CPU and compiler", most >= Kernel::avx512_bf16,
           Kernel::avx512_bf16},
          {"amx", "AMX in CPU and compiler, and Linux", most >= Kernel::amx, Kernel::amx},
          {"steps", "a GPU and a build for GPUs", gpu, most},
          {"persistent", "a GPU and a build for GPUs", gpu, most, true}};
}

// The names of those that can run here.
std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const Choice& choice : choices())
    if (choice.here && !choice.name.empty()) names.push_back(choice.name);
  return names;
}

// From now on use this one; "" means the best.
void use_kernel(const std::string& name) {
  const auto all = choices();
  const auto found = std::find_if(all.begin(), all.end(),
                                  [&](const Choice& choice) { return choice.name == name; });
  const std::string possible = "; possible here: plain, " + c10::Join(", ", kernels());
  TORCH_CHECK_VALUE(found != all.end(), "RNN_KERNEL=", name, " is not a kernel", possible);
  TORCH_CHECK_VALUE(found->here, "RNN_KERNEL=", name, " needs ", found->needs, possible);
  cpu_kernel = found->cpu;
  gpu_persistent = found->persistent;
}

// ---- Checks ----

void check(const char* name, const at::Tensor& t, const at::Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK(t.device() == like.device() && t.layout() == at::kStrided, "lstm: ", name,
              " must be a dense tensor on ", like.device(), ", got ", t.device());
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), "lstm: ", name, " must be ",
              like.scalar_type(), " as the others, got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, "lstm: ", name, " must be ", shape, ", got ", t.sizes());
}

void check_type(const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 ||
                  (type == at::kHalf && t.is_cuda()),
              "lstm: float32, float64, bfloat16 or, on CUDA, float16 expected, got ", type);
}

// w_hh decides H, the type and the device of all others.
int64_t check_w_hh(const at::Tensor& w) {
  TORCH_CHECK(w.dim() == 2 && w.size(1) >= 1 && w.size(0) % 4 == 0 && w.size(0) / 4 == w.size(1),
              "lstm: w_hh must be (4H, H), got ", w.sizes());
  check_type(w);
  check("w_hh", w, w, w.sizes());
  return w.size(1);
}

void check_sizes(at::IntArrayRef sizes, int64_t B, int64_t N) {
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

}  // namespace

Kernel kernel() { return cpu_kernel; }
bool persistent() { return gpu_persistent; }

void check_forward(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
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

void check_backward(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
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

// ---- The operators on the CPU ----

namespace {

bool simple(const at::Tensor& t) {
  return kernel() == Kernel::simple && t.scalar_type() != at::kBFloat16;
}

Three forward(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
              const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
              at::IntArrayRef sizes, bool reverse, bool save) {
  check_forward(x, w_ih, bias, h0, c0, w_hh, sizes);
  const NoAutocast here;
  const auto compute = simple(x) ? forward_simple : forward_fast;
  return compute(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, save);
}

Four backward(const at::Tensor& dh, const std::optional<at::Tensor>& dc, const at::Tensor& gates,
              const at::Tensor& c, const at::Tensor& c0, const std::optional<at::Tensor>& w_ih,
              const at::Tensor& w_hh, at::IntArrayRef sizes, bool reverse) {
  check_backward(dh, dc, gates, c, c0, w_ih, w_hh, sizes);
  const NoAutocast here;
  const auto compute = simple(dh) ? backward_simple : backward_fast;
  return compute(dh, dc, gates, c, c0, w_ih, w_hh, sizes, reverse);
}

Three weight_gradients(const at::Tensor& da, const at::Tensor& x, const at::Tensor& h,
                       const at::Tensor& h0, at::IntArrayRef sizes, bool reverse) {
  TORCH_CHECK(x.dim() == 2 && h0.dim() == 2, "lstm: x and h0 must have 2 dimensions, got ",
              x.dim(), " and ", h0.dim());
  const int64_t N = x.size(0), I = x.size(1), B = h0.size(0), H = h0.size(1);
  check_type(da);
  check("da", da, da, {N, 4 * H}), check("x", x, da, {N, I});
  check("h", h, da, {N, H}), check("h0", h0, da, {B, H});
  check_sizes(sizes, B, N);
  const NoAutocast here;
  const auto compute = simple(da) ? weight_gradients_simple : weight_gradients_fast;
  return compute(da, x, h, h0, sizes, reverse);
}

}  // namespace
}  // namespace rnn

TORCH_LIBRARY(rnn, m) {
  m.def("lstm_forward(Tensor x, Tensor w_ih, Tensor bias, Tensor h0, Tensor c0, Tensor w_hh, "
        "SymInt[] sizes, bool reverse, bool save) -> (Tensor, Tensor, Tensor)");
  m.def("lstm_backward(Tensor dh, Tensor? dc, Tensor gates, Tensor c, Tensor c0, Tensor? w_ih, "
        "Tensor w_hh, SymInt[] sizes, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("lstm_weight_gradients(Tensor da, Tensor x, Tensor h, Tensor h0, SymInt[] sizes, "
        "bool reverse) -> (Tensor, Tensor, Tensor)");
  m.def("kernels() -> str[]", rnn::kernels);
  m.def("use_kernel(str name) -> ()", rnn::use_kernel);
}

TORCH_LIBRARY_IMPL(rnn, CPU, m) {  // for GPUs lstm_cuda.cu does the same
  m.impl("lstm_forward", rnn::forward);
  m.impl("lstm_backward", rnn::backward);
  m.impl("lstm_weight_gradients", rnn::weight_gradients);
}

// Derivatives are in __init__.py. A gradient that is asked of an operator itself is an error:
// without this it would be zero, in silence.
TORCH_LIBRARY_IMPL(rnn, Autograd, m) {
  for (const char* name : {"lstm_forward", "lstm_backward", "lstm_weight_gradients"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

// A Python module with nothing inside: importing it loads this library, which registers the
// operators. One for another CPU is never imported: its name says for which it is (build.py).
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}
