// AMX in software, so that its kernels can be tested on a CPU without it: the tile instructions
// that csrc/amx uses, and a system that grants their use. See amx_emulated.sh.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define syscall(...) 0  // the question whether AMX may be used

namespace amx_emulated {

struct Tile {
  int rows, bytes;  // its shape: rows of `bytes` bytes
  alignas(64) unsigned char at[16][64];
};
inline thread_local Tile tiles[8];

inline void loadconfig(const void* config) {
  const auto* c = static_cast<const unsigned char*>(config);
  for (int k = 0; k < 8; ++k) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * k, 2);
    tiles[k] = {c[48 + k], bytes, {}};
  }
}
inline void load(int k, const void* from, int64_t stride) {
  for (int r = 0; r < tiles[k].rows; ++r)
    std::memcpy(tiles[k].at[r], static_cast<const char*>(from) + r * stride, tiles[k].bytes);
}
inline void store(int k, void* to, int64_t stride) {
  for (int r = 0; r < tiles[k].rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[k].at[r], tiles[k].bytes);
}
inline float flushed(float v) {  // AMX takes subnormal numbers for zero
  return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v;
}
inline float number(const unsigned char* at) {  // a bfloat16 is the upper half of a float32
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2);
  float v;
  std::memcpy(&v, &bits, 4);
  return flushed(v);
}
// c[m][n] += a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1], for all k. As Intel's manual has it, even
// and the odd numbers are summed on their own, from 0, before they are added to c.
inline void multiply(int c, int a, int b) {
  for (int m = 0; m < tiles[c].rows; ++m)
    for (int n = 0; n < tiles[c].bytes / 4; ++n) {
      float sum[2] = {}, before;
      for (int k = 0; k < tiles[a].bytes / 4; ++k)
        for (int half = 0; half < 2; ++half)
          sum[half] = flushed(std::fma(number(tiles[a].at[m] + 4 * k + 2 * half),
                                       number(tiles[b].at[k] + 4 * n + 2 * half), sum[half]));
      std::memcpy(&before, tiles[c].at[m] + 4 * n, 4);
      const float after = flushed(before + flushed(sum[0] + sum[1]));
      std::memcpy(tiles[c].at[m] + 4 * n, &after, 4);
    }
}

}  // namespace amx_emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulated::loadconfig
#define _tile_release() void()
#define _tile_loadd amx_emulated::load
#define _tile_stored amx_emulated::store
#define _tile_zero(k) std::memset(amx_emulated::tiles[k].at, 0, sizeof amx_emulated::tiles[k].at)
#define _tile_dpbf16ps amx_emulated::multiply
