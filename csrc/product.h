// The product that the kernels `vector` and `avx512_bf16` are made of: a tile of a few rows times a
// panel of a few vectors, with all sums in registers.
//
//     sums[r][v] += sum over k of x[r][k] * w[k][v]
//
// How numbers are multiplied is a policy, P:
//
//   Singles<T>   one number at a time, float or double, on any machine. The sums are T.
//   Pairs        bfloat16 with AVX-512 BF16: one instruction multiplies 16 pairs of numbers with a
//                pair and adds both products to 16 float32 sums. So it does twice the work.
//
// What is multiplied at a time, one number or a pair, is a Word. A row of x is read as it is: two
// neighbours are a pair. Of a pair of weights, one comes from the row k of w, the other from k + 1.
#pragma once
#include "simd.h"

namespace rnn {
namespace {

template <typename T> struct Singles {
  using Number = T;  // of the tensors
  using Sum = T;     // of the sums, and of the state from step to step
  using Word = T;    // what is multiplied at a time
  using Words = Vec<T>;
  static constexpr int numbers = 1;  // in a Word

  static void add(Vec<T>& sum, Word x, Words w) { sum += broadcast<T>(x) * w; }
  // One Word for each of n columns, from as many rows as a Word has numbers.
  static Words words(const T* row, const T*, int64_t n) { return load(row, n); }
  static Vec<T> sum_of(Words w) { return w; }  // of a Word's numbers
  static Vec<T> sigmoid(Vec<T> x) { return rnn::sigmoid<T>(x); }
  static Vec<T> tanh(Vec<T> x) { return rnn::tanh<T>(x); }
};

#ifdef __AVX512BF16__
struct Pairs {
  using Number = c10::BFloat16;
  using Sum = float;
  typedef uint32_t Word __attribute__((may_alias, aligned(2)));
  static constexpr int numbers = 2;
  using Words = Vec<uint32_t>;

  static void add(Vec<float>& sum, Word x, Words w) {
    const auto pair = (__m512bh)_mm512_set1_epi32(x);
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, pair, (__m512bh)w);
  }
  static Words words(const Number* even, const Number* odd, int64_t n) {
    return (Words)load(even, n) >> 16 | (odd ? (Words)load(odd, n) : Words{});
  }
  static Vec<float> sum_of(Words w) {
    return (Vec<float>)(w << 16) + (Vec<float>)(w & 0xffff0000);
  }
  static Vec<float> sigmoid(Vec<float> x) { return sigmoid_bf16(x); }
  static Vec<float> tanh(Vec<float> x) { return tanh_bf16(x); }
};
#endif

// A tile of kTileRows x kVectors sums just fits the registers with what is multiplied.
constexpr int kVectors = 4;  // as many as gates
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kTileRows = 6;  // 24 sums of 32 registers
#else
constexpr int kTileRows = 3;  // 12 of 16
#endif

// w[k][v] stands at w[k * V + v], sums[r][v] at sums[r * V + v], x[r][k] at x[r * row + k * step].
template <typename P, int R, int V>
void tile(const typename P::Words* w, Vec<typename P::Sum>* sums, const typename P::Word* x,
          int64_t row, int64_t step, int64_t K) {
  if (K < 1) return;  // else GCC keeps a copy of the sums in memory, for the case of no loop
  Vec<typename P::Sum> sum[R][V] = {};
  for (int64_t k = 0; k < K; ++k, w += V, x += step)
    for (int v = 0; v < V; ++v) {
      // volatile: loaded once, not once for every row
      const typename P::Words weights = const_cast<const volatile typename P::Words*>(w)[v];
      for (int r = 0; r < R; ++r) P::add(sum[r][v], x[r * row], weights);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r * V + v] += sum[r][v];
}

// The same for any number of rows up to kTileRows and of vectors up to kVectors. Both are template
// parameters of `tile`, with one function for each, because only a sum whose place is known to the
// compiler can stay in a register.
template <typename P, int R = kTileRows, int V = kVectors, typename... Rest>
void product(int64_t rows, int64_t vectors, Rest... rest) {
  if constexpr (R > 1)
    if (rows < R) return product<P, R - 1, V>(rows, vectors, rest...);
  if constexpr (V > 1)
    if (vectors < V) return product<P, R, V - 1>(rows, vectors, rest...);
  tile<P, R, V>(rest...);
}

// Cuts begin .. end into pieces of at most `most`, equal to within one: 7 = 3 + 4, not 6 + 1.
template <typename Body>
inline void for_pieces(int64_t begin, int64_t end, int64_t most, const Body& body) {
  const int64_t n = end - begin, pieces = (n + most - 1) / most;  // none if end <= begin
  for (int64_t j = 0; j < pieces; ++j) body(begin + n * j / pieces, begin + n * (j + 1) / pieces);
}

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Rows of a buffer of T, far enough apart that a tile's rows do not fall into the same cache set.
template <typename T> int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(n, line) + 2) * line;
}

}  // namespace
}  // namespace rnn
