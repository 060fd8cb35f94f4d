// The persistent form of lstm_cuda.cu: one launch for all steps. It compiles, but it has never run
// on a GPU, so only RNN_KERNEL=persistent uses it.
//
// Each thread block owns some hidden units, and keeps their part of W_hh in its shared memory from
// the first step to the last. Per step it
//     waits until all blocks have written the state of the step before,
//     multiplies that state with its part of W_hh, each warp a share of the sum,
//     adds up the shares and applies the nonlinearities, one thread per sequence and unit, which
//         carries c in a register,
//     writes its units of the new state, and says so.
// The batch is cut into groups; they do not need each other, so none waits for another. All blocks
// must be on the GPU at the same time: a cooperative launch. For float32 (plain products) and the
// 16-bit types (tensor cores), if it all fits.
//
// Backward is the same with the steps the other way round: the state that travels is da, 4H wide,
// and a block owns columns of W_hh instead of rows.
#pragma once
#include "cuda_common.cuh"

#include <cuda/atomic>
#include <mma.h>

#include <limits>

namespace rnn {
namespace {

// ---- The product ----

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
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // `plan` refuses older GPUs
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

// ---- The barrier ----

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

// ---- The kernels ----

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

// ---- Whether it fits, and the launch ----

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

// As forward_steps; c is (B,H) unless `save`. False: it does not fit, and nothing was done.
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

}  // namespace
}  // namespace rnn
