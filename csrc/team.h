// What the CPU kernels share: threads, the walk over the steps, and memory.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <mutex>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rnn {
namespace {

inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// What one thread does. Either some rows of the batch for all panels of units: then it never needs
// what another one has computed. Every count-th row, so that also steps of fewer and fewer rows are
// shared fairly. Or some panels for all rows: then its part of the weights stays in its own cache,
// but every step must wait for all threads to end the one before.
struct Share {
  int64_t row, every;            // rows row, row + every, row + 2 every, ..
  int64_t panel, panel_end;
  int64_t id, count;             // this thread, of so many
  bool alone;                    // it has rows of its own

  int64_t rows(int64_t n) const {  // how many it has of the first n rows
    return n > row ? (n - row + every - 1) / every : 0;
  }
};

// Runs body(id, count) on a team of at most `most` threads. It may be smaller than asked for, and
// is one thread without OpenMP: shares follow its true size. Inside a parallel region, one thread.
// `body` must neither throw nor allocate: an exception that leaves a team ends the process.
template <typename Body> void team_of(int64_t most, const Body& body) {
#ifdef _OPENMP
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(threads, most)))
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  body(0, 1);
#endif
}

inline int64_t cache_bytes() {  // of a core's own second-level cache
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// Runs body(share) on a team, for B rows. With rows of its own a thread reads all weights in every
// step: from its own cache, or for enough rows that it does not matter where they come from.
template <typename Body>
void team(int64_t panels, int64_t B, double weight_bytes, const Body& body) {
  auto share = [&](int64_t id, int64_t count) {
    if (B >= 16 * count || (B >= 4 * count && weight_bytes <= cache_bytes()))
      return Share{id, count, 0, panels, id, count, true};
    return Share{0, 1, panels * id / count, panels * (id + 1) / count, id, count, false};
  };
  // One thread if a step would take less time than the barrier.
  team_of(B * weight_bytes < 2e5 ? 1 : std::max(panels, B),
          [&](int64_t id, int64_t count) { body(share(id, count)); });
}

struct Step {
  int64_t row, rows;    // its rows: row .. row + rows
  int64_t prev, going;  // the first `going` of them continue rows prev .. prev + going
};

inline std::vector<Step> walk(at::IntArrayRef sizes, bool reverse) {
  std::vector<Step> steps;
  int64_t row = 0;
  for (int64_t n : sizes) steps.push_back({row, n, 0, 0}), row += n;
  if (reverse) std::reverse(steps.begin(), steps.end());
  for (size_t t = 1; t < steps.size(); ++t) {
    steps[t].prev = steps[t - 1].row;
    steps[t].going = std::min(steps[t].rows, steps[t - 1].rows);
  }
  return steps;
}

// As the kernels read it: numbers of type T, row after row.
template <typename T> at::Tensor as(const at::Tensor& t) {
  return t.to(c10::CppTypeToScalarType<T>::value).contiguous();
}

template <typename T> T* data(at::Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <typename T> const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace

// An uninitialised tensor. malloc gives large blocks back to the system, and memory new from there
// costs a fault at the first touch of each page: up to a quarter of a training step. So blocks of
// 1 MiB and more are kept when their tensors have gone, half a GiB at most, and pages are of 2 MiB.
// Not in the unnamed namespace: all files share what is kept.
inline at::Tensor buffer(at::IntArrayRef shape, const at::TensorOptions& options) {
  constexpr int64_t least = 1 << 20, most = 512 << 20;
  const int64_t bytes = c10::multiply_integers(shape) * options.dtype().itemsize();
  if (bytes < least) return at::empty(shape, options);
  static auto& mutex = *new std::mutex;  // never destroyed: a tensor may live until the very end
  static auto& kept = *new std::vector<at::Tensor>;
  // glibc keeps twice as much for torch's own tensors as the largest block that it has seen freed.
  [[maybe_unused]] static const bool once = (at::empty({30 << 20}, at::kByte), true);
  at::Tensor block;
  {
    const std::lock_guard lock(mutex);
    auto found = kept.end();  // the smallest that fits, and is not more than twice too large
    for (auto t = kept.begin(); t != kept.end(); ++t)
      if (t->numel() >= bytes && t->numel() <= 2 * bytes &&
          (found == kept.end() || t->numel() <= found->numel())) found = t;
    if (found != kept.end()) block = *found, kept.erase(found);
  }
  if (!block.defined()) {
    block = at::empty({bytes}, options.dtype(at::kByte));
#ifdef __linux__
    constexpr uintptr_t page = 1 << 21;
    uintptr_t begin = reinterpret_cast<uintptr_t>(block.data_ptr()), end = begin + bytes;
    begin = (begin + page - 1) / page * page;
    if (end >= begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }
  auto keep = [block](void*) {
    const std::lock_guard lock(mutex);
    kept.push_back(block);
    int64_t sum = 0;
    for (const at::Tensor& t : kept) sum += t.numel();
    for (; sum > most; kept.erase(kept.begin())) sum -= kept.front().numel();  // the oldest
  };
  return at::for_blob(block.data_ptr(), shape).deleter(keep).options(options)
      .allocator(c10::GetAllocator(c10::kCPU)).resizeable_storage().make_tensor();
}

}  // namespace rnn
