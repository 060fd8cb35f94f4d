// Vectors, and the LSTM's nonlinearities on them.
//
// They are the compiler's own vector types (of GCC and clang), as wide as the registers of the
// machine that the file is compiled for: AVX-512, AVX2, SSE or Arm from one source.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace rnn {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;  // SSE, Arm
#endif

template <typename T> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  static constexpr int mantissa = 23, bias = 127, terms = 7;
  static constexpr float largest = 43;  // e^-43 is nothing beside 1, and e^43 is still finite
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kBytes)));
  static constexpr int mantissa = 52, bias = 1023, terms = 14;
  static constexpr double largest = 354;
};
template <> struct Simd<uint32_t> {
  typedef uint32_t V __attribute__((vector_size(kBytes)));
};
template <typename T> using Vec = typename Simd<T>::V;
template <typename T> constexpr int kLanes = kBytes / sizeof(T);

// The same value in all lanes: `- 0` costs nothing, `+ 0` would be an addition, as it changes -0.
template <typename T> inline Vec<T> broadcast(T value) { return value - Vec<T>{}; }

// Of a vector's lanes only the first n exist in memory: the last panel may reach beyond H.
template <typename T> inline Vec<T> load(const T* p, int64_t n) {
  using Unaligned = typename Simd<T>::Unaligned;
  if (n >= kLanes<T>) return *reinterpret_cast<const Unaligned*>(p);
  Vec<T> v{};
  for (int64_t j = 0; j < n; ++j) v[j] = p[j];
  return v;
}
// A bfloat16 is the upper half of a float32, and becomes one.
typedef uint16_t Half __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));
inline Vec<float> load(const c10::BFloat16* p, int64_t n) {
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  if (n >= kLanes<float>)
    return (Vec<float>)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16);
  Vec<float> v{};
  for (int64_t j = 0; j < n; ++j) v[j] = p[j];
  return v;
}
template <typename T> inline void store(T* p, Vec<T> v, int64_t n) {
  using Unaligned = typename Simd<T>::Unaligned;
  if (n >= kLanes<T>) *reinterpret_cast<Unaligned*>(p) = v;
  else for (int64_t j = 0; j < n; ++j) p[j] = v[j];
}

#ifdef __AVX512BF16__
inline void store(c10::BFloat16* p, Vec<float> v, int64_t n) {
  if (n >= kLanes<float>) *reinterpret_cast<Half*>(p) = (Half)_mm512_cvtneps_pbh((__m512)v);
  else for (int64_t j = 0; j < n; ++j) p[j] = v[j];
}
#endif

// x, but from -most to most. NaN stays NaN.
template <typename V, typename T> inline V clamp(V x, T most) {
  x = most < x ? broadcast<T>(most) : x;
  return -most > x ? broadcast<T>(-most) : x;
}
#ifdef __AVX512F__  // one instruction for each limit; GCC makes two of the above
inline Vec<float> clamp(Vec<float> x, float most) {
  const __m512 high = _mm512_set1_ps(most);
  return (Vec<float>)_mm512_max_ps(-high, _mm512_min_ps(high, (__m512)x));
}
#endif

// e^x - 1, exact to the last bits also near 0: with x = n ln2 + r, |r| <= ln2 / 2, it is
// 2^n (e^r - 1) + (2^n - 1), and e^r - 1 is its Taylor series. NaN stays NaN.
template <typename T> inline Vec<T> expm1(Vec<T> x) {
  using S = Simd<T>;
  constexpr T ln2_high = 355.0L / 512;  // has few bits, so that n * ln2_high is exact
  constexpr T ln2_low = 0.693147180559945309417232L - 355.0L / 512;
  constexpr T round = 1.5L * (int64_t(1) << S::mantissa);  // adding it rounds to an integer
  x = clamp(x, S::largest);
  Vec<T> shifted = x * T(1.442695040888963407359925L) + round;  // n stands in its lowest bits
  Vec<T> n = shifted - round;
  Vec<T> r = x - n * ln2_high - n * ln2_low;
  long double factorial = 1;
  T inverse[S::terms + 1];  // 1 / k!, worked out by the compiler
  for (int k = 1; k <= S::terms; ++k) inverse[k] = T(1 / (factorial *= k));
  Vec<T> p = broadcast<T>(inverse[S::terms]);
  for (int k = S::terms - 1; k >= 1; --k) p = p * r + inverse[k];
  Vec<T> power = (Vec<T>)(((typename S::I)shifted + S::bias) << S::mantissa);  // 2^n
  return power * (p * r) + (power - 1);
}

// sigmoid(x) = 1 / (1 + e^-x);  tanh(x) = (1 - e^-2x) / (1 + e^-2x)
template <typename T> inline Vec<T> sigmoid(Vec<T> x) { return 1 / (2 + expm1<T>(-x)); }
template <typename T> inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> m = expm1<T>(-2 * x);
  return -m / (2 + m);
}

#ifdef __AVX512BF16__
// The same for results that become bfloat16, of 8 bits. The CPU's table of reciprocals, 14 bits, is
// precise enough for them, and so is a shorter series: the error of e^x - 1 is below 3e-6.
inline Vec<float> expm1_bf16(Vec<float> x) {
  const __m512 q = (__m512)clamp(x * 1.44269504f, 126.0f);  // 2^126 is still finite
  const __m512 n = _mm512_roundscale_ps(q, 0), r = (q - n) * 0.69314718f;
  __m512 p = _mm512_set1_ps(1 / 120.0f);
  for (float inverse : {1 / 24.0f, 1 / 6.0f, 1 / 2.0f, 1.0f}) p = p * r + inverse;
  const __m512 power = _mm512_scalef_ps(_mm512_set1_ps(1), n);  // 2^n
  return (Vec<float>)(power * (p * r) + (power - 1));
}
inline Vec<float> sigmoid_bf16(Vec<float> x) {
  return (Vec<float>)_mm512_rcp14_ps((__m512)(2 + expm1_bf16(-x)));
}
inline Vec<float> tanh_bf16(Vec<float> x) {
  const Vec<float> m = expm1_bf16(-2 * x);
  return -m * (Vec<float>)_mm512_rcp14_ps((__m512)(2 + m));
}
#endif

}  // namespace
}  // namespace rnn
