// The operators of lstm.h through AMX, the CPU's unit for products of tiles: see tiles.h.
#pragma once
#include "../lstm.h"

#if defined(__AMXBF16__) && !defined(__AMX_BF16__)
#define __AMX_BF16__ 1  // older versions of clang spell it so
#endif

namespace rnn {

// As in lstm.h. They return nothing if another kernel should compute it: because that is faster, or
// because a float32 result is NaN, which splitting into parts may have caused.
std::optional<Three> forward_amx(const at::Tensor& x, const at::Tensor& w_ih,
                                 const at::Tensor& bias, const at::Tensor& h0,
                                 const at::Tensor& c0, const at::Tensor& w_hh,
                                 at::IntArrayRef sizes, bool reverse, bool save);
std::optional<Four> backward_amx(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                                 const at::Tensor& gates, const at::Tensor& c,
                                 const at::Tensor& c0, const std::optional<at::Tensor>& w_ih,
                                 const at::Tensor& w_hh, at::IntArrayRef sizes, bool reverse);
std::optional<Three> weight_gradients_amx(const at::Tensor& da, const at::Tensor& x,
                                          const at::Tensor& h, const at::Tensor& h0,
                                          at::IntArrayRef sizes, bool reverse);

}  // namespace rnn
