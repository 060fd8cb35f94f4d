// The operators of lstm.h on CUDA: float32, float64, float16 and bfloat16, in two forms.
//
// Both start with the input's part of the sums, for all steps in one product:
//     gates = bias + x W_ih^T, (N,4H); each step adds its W_hh h' to its rows and activates them.
//
// Stepwise     per step one product, of torch (cuBLAS), and one kernel for all that is elementwise.
//              For any size.
// Persistent   one launch for all steps. Each thread block owns some hidden units, and keeps their
//              part of W_hh in its shared memory from the first step to the last. Per step it
//                  waits until all blocks have written the state of the step before,
//                  multiplies that state with its part of W_hh, each warp a share of the sum,
//                  adds up the shares and applies the nonlinearities, one thread per sequence and
//                  unit, which carries c in a register,
//                  writes its units of the new state, and says so.
//              The batch is cut into groups; they do not need each other, so none waits for
//              another. All blocks must be on the GPU at the same time: a cooperative launch.
//              For float32 (plain products) and the 16-bit types (tensor cores), if it all fits.
//
// Backward is the same with the steps the other way round: the state that travels is da, 4H wide,
// and a block owns columns of W_hh instead of rows.
//
// Numbers      The 16-bit types are types of storage: of gates, h and what the products read. Sums
//              and nonlinearities are float32; so are c and dc as long as they travel from step to
//              step. The c (N,H) kept for backward is rounded to the 16-bit type. The stepwise form
//              rounds the sums too, since torch's product does.
//              No floating-point atomics, every sum in a fixed order: the same bits every time.
// Streams      All work goes to the caller's current stream, nothing waits for it, and all that a
//              kernel needs to know of `sizes` is in its arguments. So calls can be captured into a
//              CUDA graph.
//
// RNN_PERSISTENT in the environment: 0 never takes the persistent form, 1 is an error if it does
// not fit; unset, it is taken when it fits.
#include "lstm.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda/atomic>
#include <mma.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>

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

// gate: i, f, g, o, becomes da. dc: dc[t] + dc' f', becomes dc f, for the next step.
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

// ---- Stepwise ----

constexpr int kStepThreads = 256;

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
  dim3 grid(int64_t count) const { return (count + kStepThreads - 1) / kStepThreads; }
};

// gates: the input's part of the sums. c: (N,H), or undefined in inference. c_now: float32 (B,H)
template <typename T>
void stepwise_forward(const Problem& p, const at::Tensor& h0, const at::Tensor& w_hh,
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
    step_forward<T><<<p.grid(count), kStepThreads, 0, p.stream>>>(
        count, p.H, a.data_ptr<T>(), c_now.data_ptr<F>(), h_now.data_ptr<T>(),
        h.data_ptr<T>() + row, c.defined() ? c.data_ptr<T>() + row : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// da_now: (B,4H), at first zero, at the end the da of every sequence's first step. dc_now: likewise
// dc * f, float32 (B,H)
template <typename T>
void stepwise_backward(const Problem& p, const at::Tensor& dh, const at::Tensor& dc,
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
    step_backward<T><<<p.grid(count), kStepThreads, 0, p.stream>>>(
        count, p.H, dh.const_data_ptr<T>() + row,
        dc.defined() ? dc.const_data_ptr<T>() + row : nullptr, gates.const_data_ptr<T>() + 4 * row,
        c.const_data_ptr<T>() + row, c.const_data_ptr<T>() + before.row * p.H, before.rows,
        c0.const_data_ptr<T>(), sum.const_data_ptr<T>(), dc_now.data_ptr<F>(),
        da_now.data_ptr<T>(), da.data_ptr<T>() + 4 * row);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    step = before;
  }
}

// ---- Persistent: the product ----

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kTile = 16;  // rows of the batch that a warp takes at once; also its step in k

// The state that travels has rows of a multiple of kTile, the rest zero. A block's part of W_hh has
// rows 16 bytes longer than that, so that the same column of 8 rows lies in different banks.
__host__ __device__ inline int padded(int64_t K) { return (K + kTile - 1) / kTile * kTile; }
template <typename T> __host__ __device__ int stride(int K) { return K + 16 / sizeof(T); }

// One warp: sums[r][j] = sum over k of x[r][k] w[j][k] for 16 rows r and J columns j; of all blocks
// of 16 k, one in `shares`, from `share` on. x (16,K) in global, w (J,K) in shared memory.
template <int J>
__device__ void multiply(const float* x, const float* w, int K, int share, int shares,
                         float* sums) {
  const int row = threadIdx.x % 32 / 8, column = threadIdx.x % 8;  // and every 4th, 8th from there
  float sum[4][J / 8] = {};
  for (int k0 = share * kTile; k0 < K; k0 += shares * kTile)
#pragma unroll 2
    for (int k = k0; k < k0 + kTile; k += 4) {
      float4 a[4];
      for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const float4*>(x + (row + 4 * i) * K + k);
      for (int j = 0; j < J / 8; ++j) {
        const float4 b =
            *reinterpret_cast<const float4*>(w + (column + 8 * j) * stride<float>(K) + k);
        for (int i = 0; i < 4; ++i)
          sum[i][j] += a[i].x * b.x + a[i].y * b.y + a[i].z * b.z + a[i].w * b.w;
      }
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < J / 8; ++j) sums[(row + 4 * i) * (J + 8) + column + 8 * j] = sum[i][j];
}

// The same with tensor cores, in tiles of 16 x 16 x 16. Native is CUDA's name for a 16-bit type.
template <int J, typename Native>
__device__ void multiply(const Native* x, const Native* w, int K, int share, int shares,
                         float* sums) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // older GPUs take the stepwise form
  namespace wmma = nvcuda::wmma;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, Native, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, Native, wmma::col_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[J / 16];
  for (auto& s : sum) wmma::fill_fragment(s, 0.0f);
#pragma unroll 4
  for (int k = share * kTile; k < K; k += shares * kTile) {
    wmma::load_matrix_sync(a, x + k, K);
    for (int j = 0; j < J / 16; ++j) {
      wmma::load_matrix_sync(b, w + j * 16 * stride<Native>(K) + k, stride<Native>(K));
      wmma::mma_sync(sum[j], a, b, sum[j]);
    }
  }
  for (int j = 0; j < J / 16; ++j)
    wmma::store_matrix_sync(sums + j * 16, sum[j], J + 8, wmma::mem_row_major);
#endif
}

template <typename T> struct NativeOf { using type = float; };
template <> struct NativeOf<at::Half> { using type = __half; };
template <> struct NativeOf<at::BFloat16> { using type = __nv_bfloat16; };

// One block: the warps are spread over the tiles of 16 rows, and those of one tile over k.
// x (rows,K), w (J,K) -> sums (shares, rows, J + 8); returns the number of shares, to be added up.
template <int J, typename T>
__device__ int product(const T* x, const T* w, int K, int rows, float* sums) {
  using Native = typename NativeOf<T>::type;
  const int warp = threadIdx.x / 32, tiles = rows / kTile, shares = kWarps / tiles;
  const int tile = warp % tiles, share = warp / tiles;
  if (share < shares)
    multiply<J>(reinterpret_cast<const Native*>(x + tile * kTile * K),
                reinterpret_cast<const Native*>(w), K, share, shares,
                sums + (share * rows + tile * kTile) * (J + 8));
  __syncthreads();
  return shares;
}
constexpr size_t sums_bytes(int J) { return kWarps * kTile * (J + 8) * sizeof(float); }

// ---- Persistent: the barrier ----

// Each block of a group has a word in global memory: how many steps it has done. To wait is to read
// the words of all until none is behind. Release and acquire order everything else around them:
// what any thread of a block wrote before `arrive`, all threads of the others see after `wait`.
using Word = cuda::atomic_ref<unsigned, cuda::thread_scope_device>;

__device__ inline void arrive(unsigned* done, unsigned step) {
  __syncthreads();
  if (threadIdx.x == 0) Word(done[blockIdx.x]).store(step, cuda::memory_order_release);
}

__device__ inline void wait(unsigned* done, unsigned step) {
  for (unsigned k = threadIdx.x; k < gridDim.x; k += kThreads)
    while (Word(done[k]).load(cuda::memory_order_acquire) < step) {
    }
  __syncthreads();
}

// ---- Persistent: the kernels ----

constexpr int kMostSequences = 512;  // their lengths are among the arguments, of at most 4 KiB

struct Walk {
  int B, T, by;  // by: the direction of the kernel's walk in time
  int64_t N;
  int length[kMostSequences];

  __device__ Place next(Place p) const {
    int n = p.rows;  // of step t, searched from its neighbour's
    const int t = p.t + by;
    while (n < B && length[n] > t) ++n;
    while (n > 0 && length[n - 1] <= t) --n;
    return neighbour(p, by, t < 0 ? 0 : n);
  }
  __device__ Place begin() const { return next(outside(T, N, by)); }
};

// What thread blocks and threads stand for. Grid: (blocks of units, groups of rows of the batch).
struct Mine {
  int64_t b, unit;  // a thread's sequence and unit; it may be idle
  int row, column;  // the same within the block's tile
  bool exists;

  __device__ Mine(int units, int rows, int64_t B, int64_t H)
      : row(threadIdx.x / units), column(threadIdx.x % units) {
    b = int64_t(blockIdx.y) * rows + row, unit = int64_t(blockIdx.x) * units + column;
    exists = row < rows && b < B && unit < H;
  }
};

constexpr int kForwardUnits = 8;  // of a block
template <typename T> constexpr int kBackwardUnits = sizeof(T) == 2 ? 16 : 8;  // a tensor core's 16

template <typename T> struct Forward {
  const T *c0, *w_hh;     // as in lstm.h
  T *h, *c, *gates;       // as in lstm.h; gates come as the input's part of the sums
  T* h_now;               // (2, groups * rows, padded H): the state, double-buffered, first h0
  unsigned* done;         // (groups, blocks of units), zero
  int H, rows;            // rows: of a group, a multiple of kTile
  bool save;              // else c is (B,H): what the sequences end with
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
persistent_forward(const __grid_constant__ Forward<T> a, const __grid_constant__ Walk walk) {
  constexpr int U = kForwardUnits, J = 4 * U;
  const int64_t H = a.H;
  const int K = padded(H);
  extern __shared__ __align__(128) unsigned char shared[];
  T* w = reinterpret_cast<T*>(shared);  // (J,K): row 4 u + k is gate k of unit u
  float* sums = reinterpret_cast<float*>(w + J * stride<T>(K));
  for (int i = threadIdx.x; i < J * K; i += kThreads) {
    const int64_t j = i / K, k = i % K, unit = int64_t(blockIdx.x) * U + j / 4;
    w[j * stride<T>(K) + k] = k < H && unit < H ? a.w_hh[(j % 4 * H + unit) * H + k] : T(0);
  }
  const Mine my(U, a.rows, walk.B, H);
  unsigned* done = a.done + blockIdx.y * gridDim.x;
  T* h_now = a.h_now + int64_t(blockIdx.y) * a.rows * K;
  float c = my.exists ? float(a.c0[my.b * H + my.unit]) : 0;
  Place step = walk.begin();
  for (int s = 0; s < walk.T; ++s, step = walk.next(step)) {
    const int64_t turn = int64_t(gridDim.y) * a.rows * K;
    const T* before = h_now + s % 2 * turn;
    T* after = h_now + (s + 1) % 2 * turn;
    const bool active = my.exists && my.b < step.rows;
    const int64_t row = step.row + my.b;
    T* gates = a.gates + row * 4 * H + my.unit;
    float gate[4] = {}, h = 0;
    if (active)  // reads from far: on their way while others are waited for
      for (int k = 0; k < 4; ++k) gate[k] = gates[k * H];
    wait(done, s);
    const int shares = product<J>(before, w, K, a.rows, sums);
    if (active) {
      for (int share = 0; share < shares; ++share) {
        const float* sum = sums + (share * a.rows + my.row) * (J + 8) + my.column * 4;
        const float4 part = *reinterpret_cast<const float4*>(sum);
        gate[0] += part.x, gate[1] += part.y, gate[2] += part.z, gate[3] += part.w;
      }
      h = cell(gate, c);
      after[my.row * K + my.unit] = h;
    }
    arrive(done, s + 1);
    if (!active) continue;
    a.h[row * H + my.unit] = h;  // what no other block waits for comes last
    if (!a.save) continue;
    a.c[row * H + my.unit] = c;
    for (int k = 0; k < 4; ++k) gates[k * H] = gate[k];
  }
  if (my.exists && !a.save) a.c[my.b * H + my.unit] = c;
}

template <typename T> struct Backward {
  const T *dh, *dc, *gates, *c, *c0, *w_hh;  // as in lstm.h; dc may be null
  T* da;                                     // as in lstm.h
  T *da_first, *dc0;                         // (B,4H), (B,H): of every sequence's first step
  T* da_now;                                 // (2, groups * rows, padded 4H), double-buffered; zero
  unsigned* done;                            // as in Forward
  int H, rows;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
persistent_backward(const __grid_constant__ Backward<T> a, const __grid_constant__ Walk walk) {
  constexpr int U = kBackwardUnits<T>, J = U;
  const int64_t H = a.H;
  const int K = padded(4 * H);
  extern __shared__ __align__(128) unsigned char shared[];
  T* w = reinterpret_cast<T*>(shared);  // (J,K): row u is column u of W_hh
  float* sums = reinterpret_cast<float*>(w + J * stride<T>(K));
  for (int i = threadIdx.x; i < J * K; i += kThreads) {
    const int64_t j = i % J, k = i / J, unit = int64_t(blockIdx.x) * U + j;
    w[j * stride<T>(K) + k] = k < 4 * H && unit < H ? a.w_hh[k * H + unit] : T(0);
  }
  const Mine my(U, a.rows, walk.B, H);
  unsigned* done = a.done + blockIdx.y * gridDim.x;
  T* da_now = a.da_now + int64_t(blockIdx.y) * a.rows * K;
  float dc_now = 0;  // dc' f'
  Place step = walk.begin();
  for (int s = 0; s < walk.T; ++s) {
    const Place before = walk.next(step);  // in forward's order; the next one here
    const int64_t turn = int64_t(gridDim.y) * a.rows * K;
    const T* da_before = da_now + s % 2 * turn;
    T* da_after = da_now + (s + 1) % 2 * turn;
    const bool active = my.exists && my.b < step.rows, goes_on = my.b < before.rows;
    const int64_t row = step.row + my.b, j = row * H + my.unit;
    float gate[4] = {}, c = 0, c_before = 0, dh = 0;
    if (active) {
      for (int k = 0; k < 4; ++k) gate[k] = a.gates[(row * 4 + k) * H + my.unit];
      c = a.c[j], dh = a.dh[j];
      c_before = goes_on ? a.c[(before.row + my.b) * H + my.unit] : a.c0[my.b * H + my.unit];
      if (a.dc) dc_now += float(a.dc[j]);
    }
    wait(done, s);
    const int shares = product<J>(da_before, w, K, a.rows, sums);
    if (active) {
      for (int share = 0; share < shares; ++share)
        dh += sums[(share * a.rows + my.row) * (J + 8) + my.column];
      cell_backward(gate, c, c_before, dh, dc_now);
      for (int k = 0; k < 4; ++k) da_after[int64_t(my.row) * K + k * H + my.unit] = gate[k];
    }
    arrive(done, s + 1);
    if (active)
      for (int k = 0; k < 4; ++k) {
        a.da[(row * 4 + k) * H + my.unit] = gate[k];
        if (!goes_on) a.da_first[(my.b * 4 + k) * H + my.unit] = gate[k];
      }
    step = before;
  }
  if (my.exists) a.dc0[my.b * H + my.unit] = dc_now;
}

// ---- Persistent: whether it fits, and the launch ----

constexpr char kNoFit[] = "RNN_PERSISTENT=1, but no persistent form fits this GPU for B=";

std::string wish() {
  const char* value = std::getenv("RNN_PERSISTENT");
  const std::string wish = value ? value : "";
  TORCH_CHECK(wish == "" || wish == "0" || wish == "1",
              "RNN_PERSISTENT must be 0, 1 or unset, got '", wish, "'");
  return wish;
}

int64_t device_has(cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, c10::cuda::current_device()));
  return value;
}

struct Plan {
  int rows = 0;  // of a group; 0: it does not fit
  size_t shared_bytes = 0;
  dim3 grid;
};

// A block owns `units` units and can take kThreads / units rows. A group has copies of the weights,
// and less work the fewer rows it has: so take as many as there are multiprocessors for.
template <typename T> Plan plan(void* kernel, const Problem& p, int units, int J, int64_t K) {
  const size_t shared_bytes = J * size_t(stride<T>(K)) * sizeof(T) + sums_bytes(J);
  const int64_t blocks = (p.H + units - 1) / units, tiles = (p.B + kTile - 1) / kTile;
  const int64_t most = kThreads / units / kTile;  // tiles of a group
  const int64_t processors = device_has(cudaDevAttrMultiProcessorCount);
  int64_t groups = std::max((tiles + most - 1) / most, std::min(tiles, processors / blocks));
  const int64_t each = (tiles + groups - 1) / groups;
  groups = (tiles + each - 1) / each;  // no empty ones
  if (p.B > kMostSequences || p.T > std::numeric_limits<int>::max() ||
      device_has(cudaDevAttrComputeCapabilityMajor) < 8 ||
      !device_has(cudaDevAttrCooperativeLaunch) ||
      shared_bytes > size_t(device_has(cudaDevAttrMaxSharedMemoryPerBlockOptin)))
    return {};
  int per_processor = 0;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(shared_bytes)));
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads,
                                                               shared_bytes));
  if (blocks * groups > processors * per_processor) return {};
  return {int(each * kTile), shared_bytes, dim3(blocks, groups)};
}

template <typename Arguments>
void launch(void* kernel, const Plan& plan, const Problem& p, int by, Arguments a) {
  Walk walk{int(p.B), int(p.T), by, p.N, {}};
  for (int64_t b = 0, t = p.T; b < p.B; ++b) {
    while (p.rows(t - 1) <= b) --t;
    walk.length[b] = t;
  }
  const at::Tensor words = at::zeros({plan.grid.x * plan.grid.y},
                                     at::device(at::kCUDA).dtype(at::kInt));
  a.done = reinterpret_cast<unsigned*>(words.data_ptr<int>());
  a.H = p.H, a.rows = plan.rows;
  void* arguments[] = {&a, &walk};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(kernel, plan.grid, dim3(kThreads), arguments,
                                             plan.shared_bytes, p.stream));
}

// As stepwise_forward; c is (B,H) unless `save`. False: it does not fit, and nothing was done.
template <typename T>
bool try_persistent_forward(const Problem& p, const at::Tensor& h0, const at::Tensor& c0,
                            const at::Tensor& w_hh, const at::Tensor& gates, const at::Tensor& h,
                            const at::Tensor& c, bool save) {
  const auto kernel = reinterpret_cast<void*>(persistent_forward<T>);
  const int K = padded(p.H);
  const Plan made = plan<T>(kernel, p, kForwardUnits, 4 * kForwardUnits, K);
  if (!made.rows) return false;
  const at::Tensor h_now = at::zeros({2, made.grid.y * made.rows, K}, w_hh.options());
  h_now.narrow(1, 0, p.B).narrow(2, 0, p.H).copy_(h0);
  Forward<T> a{};
  a.c0 = c0.const_data_ptr<T>(), a.w_hh = w_hh.const_data_ptr<T>();
  a.h = h.data_ptr<T>(), a.c = c.data_ptr<T>(), a.gates = gates.data_ptr<T>();
  a.h_now = h_now.data_ptr<T>(), a.save = save;
  launch(kernel, made, p, p.reverse ? -1 : 1, a);
  return true;
}

template <typename T>
bool try_persistent_backward(const Problem& p, const at::Tensor& dh, const at::Tensor& dc,
                             const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                             const at::Tensor& w_hh, const at::Tensor& da,
                             const at::Tensor& da_first, const at::Tensor& dc0) {
  const auto kernel = reinterpret_cast<void*>(persistent_backward<T>);
  const int K = padded(4 * p.H);
  const Plan made = plan<T>(kernel, p, kBackwardUnits<T>, kBackwardUnits<T>, K);
  if (!made.rows) return false;
  const at::Tensor da_now = at::zeros({2, made.grid.y * made.rows, K}, w_hh.options());
  Backward<T> a{};
  a.dh = dh.const_data_ptr<T>(), a.dc = dc.defined() ? dc.const_data_ptr<T>() : nullptr;
  a.gates = gates.const_data_ptr<T>(), a.c = c.const_data_ptr<T>();
  a.c0 = c0.const_data_ptr<T>(), a.w_hh = w_hh.const_data_ptr<T>(), a.da = da.data_ptr<T>();
  a.da_first = da_first.data_ptr<T>(), a.dc0 = dc0.data_ptr<T>(), a.da_now = da_now.data_ptr<T>();
  launch(kernel, made, p, p.reverse ? 1 : -1, a);
  return true;
}

// ---- The operators ----

Three forward_cuda(const at::Tensor& x, const at::Tensor& w_ih, const at::Tensor& bias,
                   const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse, bool save) {
  check_forward(x, w_ih, bias, h0, c0, w_hh, sizes);
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
    const std::string wished = wish();
    bool done = false;
    if constexpr (!std::is_same_v<T, double>)
      done = wished != "0" && try_persistent_forward<T>(p, h0, c0_, w_hh_, gates, h, c, save);
    TORCH_CHECK(done || wished != "1", kNoFit, B, ", H=", H, " in ", type);
    if (done) return;
    const at::Tensor c_now = at::empty({B, H}, like.dtype(at::toOpMathType(type))).copy_(c0);
    stepwise_forward<T>(p, h0, w_hh_, gates, h, save ? c : at::Tensor(), c_now);
    if (!save) c.copy_(c_now);
  });
  return {h, c, save ? gates : none};
}

Four backward_cuda(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                   const at::Tensor& gates, const at::Tensor& c, const at::Tensor& c0,
                   const std::optional<at::Tensor>& w_ih, const at::Tensor& w_hh,
                   at::IntArrayRef sizes, bool reverse) {
  check_backward(dh, dc, gates, c, c0, w_ih, w_hh, sizes);
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
    const std::string wished = wish();
    bool done = false;
    if constexpr (!std::is_same_v<T, double>)
      done = wished != "0" && try_persistent_backward<T>(p, dh_, dc_, gates_, c_, c0_, w_hh_, da,
                                                         da_first, dc0);
    TORCH_CHECK(done || wished != "1", kNoFit, B, ", H=", H, " in ", type);
    if (done) return;
    const at::Tensor dc_now = at::zeros({B, H}, like.dtype(at::toOpMathType(type)));
    stepwise_backward<T>(p, dh_, dc_, gates_, c_, c0_, w_hh_, da, da_first, dc_now);
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
