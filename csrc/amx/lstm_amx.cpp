// The operators of lstm.h through products of bfloat16 tiles: see tiles.h.
//
// Tiles are multiplied by a unit of their own, so the nonlinearities of one panel of 32 units are
// computed between the products of the next panel: 16 units of a row at a time.
//
// Operands: the rows are what varies with time, [x[t] h'] forward and da' backward. They are
// double-buffered: one is read, one written for the next step. The columns are [W_ih W_hh]^T and,
// backward, W_hh and W_ih.
// From step to step the cell state and its gradient are float32, for both types of tensors.
#include "amx.h"

#ifdef __AMX_BF16__
#include "../team.h"
#include "tiles.h"

#include <atomic>

namespace rnn {
namespace {

// ---- Threads ----

// What one thread does. Either some rows of the batch for all units: then it never needs what
// another one has computed. Or some units for all rows: then its part of the weights stays in its
// own cache, but every step must wait for all threads to end the one before. Units come in panels,
// rows in tiles of `tile` rows.
struct TileShare {
  int64_t row, row_end, panel, panel_end;
  int64_t pack, pack_end;  // panels to copy at the beginning
  int64_t id, count;       // this thread, of so many
  bool alone;
};

// Whether each thread may take rows of its own: the weights fit each one's cache, and halves of the
// rows are halves of the work, as all sequences are equally long.
inline bool can_share_rows(at::IntArrayRef sizes, double weight_bytes, int64_t threads) {
  return sizes.back() == sizes[0] && sizes[0] >= 4 * threads && weight_bytes <= 1.6e6;
}

// Runs body(share) on a team.
template <typename Body>
void team_of_tiles(int64_t panels, int64_t tile, at::IntArrayRef sizes, double weight_bytes,
          const Body& body) {
  const int64_t B = sizes[0], tiles = (B + tile - 1) / tile;
  auto share = [&](int64_t id, int64_t count) {
    const int64_t p0 = panels * id / count, p1 = panels * (id + 1) / count;
    const bool even = tiles % count == 0 || tiles >= 16 * count;
    if (even && can_share_rows(sizes, weight_bytes, count))
      return TileShare{tiles * id / count * tile, std::min(B, tiles * (id + 1) / count * tile), 0,
                   panels, p0, p1, id, count, true};
    return TileShare{0, B, p0, p1, p0, p1, id, count, false};
  };
  // One thread if a step would take less time than the barrier.
  team_of(B * weight_bytes < 2e5 ? 1 : panels,
          [&](int64_t id, int64_t count) { body(share(id, count)); });
}

// The row in which each of B sequences begins.
inline std::vector<int64_t> first_rows(const std::vector<Step>& steps, int64_t B) {
  std::vector<int64_t> first(B);
  for (const Step& s : steps)
    for (int64_t b = s.going; b < s.rows; ++b) first[b] = s.row + b;
  return first;
}

// ---- The nonlinearities, for numbers of P parts ----

template <int P> inline Floats sigmoid_of(Floats x) {
  return (Floats)(P == 3 ? sigmoid<float>((Vec<float>)x) : sigmoid_bf16((Vec<float>)x));
}
template <int P> inline Floats tanh_of(Floats x) {
  return (Floats)(P == 3 ? tanh<float>((Vec<float>)x) : tanh_bf16((Vec<float>)x));
}

// Where the numbers from k on of row r of a row tile stand; k a multiple of 16, of K.
template <int P> inline Bf16* at_row(Bf16* rows, int64_t tile, int64_t r, int64_t k, int64_t K) {
  return rows + (tile * (K / 32) + k / 32) * P * kTileNumbers + r * 32 + k % 32;
}

// The nonlinearities of a panel of 32 units in pieces, finish(row, unit) for 16 units of a row: one
// at a time between the products of the next panel.
template <typename Finish> class Epilogue {
 public:
  Epilogue(const Finish& finish, int64_t row, int64_t row_end, int64_t H)
      : finish(finish), row(row), all(std::max<int64_t>(0, row_end - row) * 2), H(H) {}
  void operator()() {
    if (j == all) return;
    const int64_t u = panel * 32 + j % 2 * 16;
    if (u < H) finish(row + j / 2, u);
    ++j;
  }
  void finish_all() {
    while (j < all) (*this)();
  }
  void follow(int64_t p) {  // panel p, whose products are now done
    finish_all();
    panel = p, j = 0;
  }

 private:
  const Finish& finish;
  const int64_t row, all, H;  // all pieces of a panel
  int64_t panel = 0, j = all;  // the next one
};

// ---- Forward ----

template <typename T> struct Forward {
  const T *x, *w_ih, *h0, *w_hh;  // as in lstm.h
  const float* bias;
  T *h, *c, *gates;         // (N,H), (N,H), (N,4H); gates null: no c either
  Bf16 *columns, *rows[2];  // the operands
  float *sums, *c_now;      // (row tiles, unit tiles, 4 gates, 16, 16); (B,H)
  int64_t B, I, H, R;       // R rows stand in a row tile
  std::atomic<bool>* nan;  // becomes true if a result is NaN
};

template <typename T>
void put_x(const Forward<T>& a, const Step& s, int64_t b0, int64_t b1, Bf16* rows, int64_t K) {
  constexpr int P = kParts<T>;
  for (int64_t b = b0; b < std::min(b1, s.rows); ++b)
    for (int64_t k = 0; k < a.I; k += 16)
      put_row<P>(at_row<P>(rows, b / a.R, b % a.R, k, K),
                 get(a.x + (s.row + b) * a.I + k, a.I - k));
}

// Rows row .. row + 16 of w (.., K), if so many exist, are columns: 32 numbers of each, from k on.
template <typename T>
void put_weights(const T* w, int64_t row, int64_t exist, int64_t K, int64_t k, Bf16* to) {
  constexpr int P = kParts<T>;
  for (int64_t r = 0; r < 16; ++r) {
    const int64_t n = r < exist ? K - k : 0;
    __m256i low[P], high[P];
    split<P>(get(w + (row + r) * K + k, n), low);
    split<P>(get(w + (row + r) * K + k + 16, n - 16), high);
    for (int p = 0; p < P; ++p)
      put_across(to + p * 2 * kTileNumbers + r * 2,
                 _mm512_inserti64x4(_mm512_castsi256_si512(low[p]), high[p], 1));
  }
}

template <typename T>
void forward(const Forward<T>& a, const std::vector<Step>& steps, const TileShare& mine) {
  constexpr int P = kParts<T>;
  const int64_t I = round_up(a.I, 32), H = a.H, K = I + round_up(H, 32), R = a.R;
  const int64_t row_tile = K / 32 * P * kTileNumbers, pair = 2 * row_tile;
  const int64_t next = (H + 31) / 32 * 8 * kSums;  // sums of a row tile
  for (int64_t u = mine.pack * 32; u < std::min(mine.pack_end * 32, H); u += 16)
    for (int64_t gate = 0; gate < 4; ++gate) {
      Bf16* to = a.columns + (u / 16 * 2 + gate / 2) * pair + gate % 2 * kTileNumbers;
      for (int64_t k = 0; k < K; k += 32, to += P * 2 * kTileNumbers)
        if (k < I) put_weights(a.w_ih, gate * H + u, H - u, a.I, k, to);
        else put_weights(a.w_hh, gate * H + u, H - u, H, k - I, to);
    }
  // Copied by this thread: x for its own rows, or any share of them.
  const int64_t x0 = mine.alone ? mine.row : a.B * mine.id / mine.count;
  const int64_t x1 = mine.alone ? mine.row_end : a.B * (mine.id + 1) / mine.count;
  for (int64_t b = x0; b < x1; ++b)
    for (int64_t k = 0; k < H; k += 16)
      for (Bf16* rows : a.rows)  // both: a sequence may begin at any step
        put_row<P>(at_row<P>(rows, b / R, b % R, I + k, K), get(a.h0 + b * H + k, H - k));
  put_x(a, steps[0], x0, x1, a.rows[0], K);
  barrier();

  TileRegisters registers(R);
  __mmask16 nan = 0;
  for (size_t t = 0; t < steps.size(); ++t) {
    const Step& s = steps[t];
    Bf16 *before = a.rows[t % 2], *after = a.rows[(t + 1) % 2];
    const int64_t row_end = std::min(mine.row_end, s.rows);
    auto finish = [&](int64_t b, int64_t u) {
      const int64_t row = s.row + b, n = H - u;
      const float* sums = a.sums + b / R * next + u / 16 * 4 * kSums + b % R * 16;
      Floats gate[4];  // i, f, g, o
      for (int j = 0; j < 4; ++j) {
        const Floats sum = _mm512_load_ps(sums + j * kSums) + get(a.bias + j * H + u, n);
        gate[j] = j == 2 ? tanh_of<P>(sum) : sigmoid_of<P>(sum);
      }
      const Floats c = gate[1] * get(a.c_now + b * H + u, n) + gate[0] * gate[2];
      // Lanes beyond H, inf * 0 if x is infinite, meet weights of 0: they must be 0 themselves.
      const Floats h = _mm512_maskz_mov_ps(first(n), gate[3] * tanh_of<P>(c));
      nan |= is_nan(h);
      put(a.c_now + b * H + u, c, n);
      put_row<P>(at_row<P>(after, b / R, b % R, I + u, K), h);
      put(a.h + row * H + u, h, n);
      if (!a.gates) return;
      put(a.c + row * H + u, c, n);
      for (int j = 0; j < 4; ++j) put(a.gates + (row * 4 + j) * H + u, gate[j], n);
    };
    Epilogue epilogue(finish, mine.row, row_end, H);
    for (int64_t p = mine.panel; p < mine.panel_end; ++p) {
      for (int64_t q = p * 4; q < std::min(p * 4 + 4, (H + 15) / 16 * 2); ++q)
        for (int64_t b = mine.row; b < row_end; b += 2 * R)  // i and f, g and o of 16 units
          product<P>(b + R < row_end, before + b / R * row_tile, row_tile,
                     a.columns + q * pair, K / 32,
                     {a.sums + b / R * next + q * 2 * kSums, 16, kSums, next}, epilogue);
      epilogue.follow(p);
    }
    epilogue.finish_all();
    if (t + 1 < steps.size()) put_x(a, steps[t + 1], x0, x1, after, K);
    if (!mine.alone) barrier();
  }
  if (nan) *a.nan = true;
}

// ---- Backward ----

template <typename T> struct Backward {
  const T *dh, *dc, *gates, *c, *c0, *w_ih, *w_hh;  // as in lstm.h; dc may be null
  T *da, *dx, *dh0;                                 // (N,4H), (N,I), (B,H)
  Bf16 *columns, *rows[2];                          // the operands
  float *sums, *dc_now;  // (row tiles, unit tiles, 16, 16): da' W_hh; (B,H): dc' f', at first zero
  const int64_t* first;  // (B): the row in which each sequence begins
  int64_t B, I, H, R;           // I 0: no dx
  std::atomic<bool>* nan;  // becomes true if a result is NaN
};

// In an operand gate gradients stand in the order [unit / 16][gate][16]: all of 16 units together.
inline int64_t place(int64_t u, int64_t gate) { return u / 16 * 64 + gate * 16; }

constexpr int64_t kAhead = 4;  // backward prefetches what it reads 4 rows later

template <typename T>
void backward(const Backward<T>& a, const std::vector<Step>& steps, const TileShare& mine) {
  constexpr int P = kParts<T>;
  const int64_t H = a.H, K = round_up(H, 16) * 4, R = a.R;
  const int64_t row_tile = K / 32 * P * kTileNumbers, pair = 2 * row_tile;
  const int64_t next = (H + 31) / 32 * 2 * kSums;  // sums of a row tile
  const int64_t begin = mine.panel * 32, end = std::min(H, mine.panel_end * 32);
  const int64_t panels = (H + 31) / 32, panels_x = (a.I + 31) / 32;  // of W_hh, then of W_ih
  const int64_t x0 = panels_x * mine.id / mine.count, x1 = panels_x * (mine.id + 1) / mine.count;
  auto pack = [&](const T* w, int64_t width, int64_t q, Bf16* to) {  // panel q of w (4H,width)
    for (int64_t k = 0; k < K / 2; ++k)  // pairs of rows: of units u and u + 1
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t gate = k % 32 / 8, u = k / 32 * 16 + k % 8 * 2, column = q * 32 + v * 16;
        const T* at = w + (gate * H + u) * width + column;
        __m512i numbers[P];
        pairs(at, u < H ? width - column : 0, at + width, u + 1 < H ? width - column : 0, numbers);
        put_columns<P>(to + (k / 16 * P * 2 + v) * kTileNumbers + k % 16 * 32, numbers);
      }
  };
  for (int64_t q = mine.pack; q < mine.pack_end; ++q) pack(a.w_hh, H, q, a.columns + q * pair);
  for (int64_t q = x0; q < x1; ++q) pack(a.w_ih, a.I, q, a.columns + (panels + q) * pair);
  barrier();

  TileRegisters registers(R);
  // All products of this thread of `rows` with W_hh; `epilogue` follows, a panel behind.
  auto products = [&](const Bf16* rows, int64_t row_end, auto&& epilogue, auto&& done) {
    for (int64_t p = mine.panel; p < mine.panel_end; ++p) {
      for (int64_t b = mine.row; b < row_end; b += 2 * R)
        product<P>(b + R < row_end, rows + b / R * row_tile, row_tile, a.columns + p * pair,
                   K / 32, {a.sums + b / R * next + p * 2 * kSums, 16, kSums, next}, epilogue);
      done(p);
    }
  };
  auto sum = [&](int64_t b, int64_t u) {  // 0 beyond H, for the same reason
    return get(a.sums + b / R * next + u / 16 * kSums + b % R * 16, H - u);
  };
  __mmask16 nan = 0;
  // dx of a step whose da is in `rows`: products with W_ih, and the sums to their place.
  auto put_dx = [&](const Step& s, const Bf16* rows, auto&& epilogue) {
    alignas(64) float sums[4 * kSums];
    const int64_t row_end = std::min(mine.row_end, s.rows);
    const int64_t p0 = mine.alone ? 0 : x0, p1 = mine.alone ? panels_x : x1;
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t b = mine.row; b < row_end; b += 2 * R) {
        product<P>(b + R < row_end, rows + b / R * row_tile, row_tile,
                   a.columns + (panels + p) * pair, K / 32, {sums, 16, kSums, 2 * kSums}, epilogue);
        for (int64_t r = b; r < std::min(b + 2 * R, row_end); ++r)
          for (int64_t v = 0; v < 2; ++v) {
            const int64_t column = p * 32 + v * 16, tile = (r - b) / R * 2 + v;
            const Floats dx = _mm512_load_ps(sums + tile * kSums + (r - b) % R * 16);
            nan |= is_nan(dx);
            put(a.dx + (s.row + r) * a.I + column, dx, a.I - column);
          }
      }
  };
  for (size_t t = steps.size(); t-- > 0;) {
    const Step& s = steps[t];
    const int64_t row_end = std::min(mine.row_end, s.rows);
    const int64_t later = t + 1 < steps.size() ? steps[t + 1].going : 0;  // rows that have a da'
    auto finish = [&](int64_t b, int64_t u) {
      const int64_t row = s.row + b, n = H - u;
      const T* c_row = b < s.going ? a.c + (s.prev + b) * H : a.c0 + b * H;
      const T* gates = a.gates + row * 4 * H + u;
      for (int64_t gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + (kAhead * 4 + gate) * H);
      for (const T* p : {a.c + row * H, c_row, a.dh + row * H})
        __builtin_prefetch(p + kAhead * H + u);
      const Floats i = get(gates, n), f = get(gates + H, n);
      const Floats g = get(gates + 2 * H, n), o = get(gates + 3 * H, n);
      const Floats tanh_c = tanh_of<P>(get(a.c + row * H + u, n));
      const Floats c_before = get(c_row + u, n);
      const Floats dh = get(a.dh + row * H + u, n) + (b < later ? sum(b, u) : Floats{});
      Floats dc = get(a.dc_now + b * H + u, n) + dh * o * (1 - tanh_c * tanh_c);
      if (a.dc) dc += get(a.dc + row * H + u, n);
      put(a.dc_now + b * H + u, dc * f, n);
      const Floats da[4] = {dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g),
                            dh * tanh_c * o * (1 - o)};
      nan |= is_nan(da[0] + da[1] + da[2] + da[3]);
      for (int64_t gate = 0; gate < 4; ++gate) {
        put_row<P>(at_row<P>(a.rows[(t + 1) % 2], b / R, b % R, place(u, gate), K), da[gate]);
        put(a.da + (row * 4 + gate) * H + u, da[gate], n);
      }
    };
    Epilogue epilogue(finish, mine.row, row_end, H);
    products(a.rows[t % 2], std::min(row_end, later), epilogue,
             [&](int64_t p) { epilogue.follow(p); });
    if (t + 1 < steps.size()) put_dx(steps[t + 1], a.rows[t % 2], epilogue);
    epilogue.finish_all();
    if (!mine.alone) barrier();
  }
  put_dx(steps[0], a.rows[1], [] {});  // its da went to rows[(0 + 1) % 2]

  // What each sequence's first step hands to h0.
  const int64_t b0 = mine.alone ? mine.row : a.B * mine.id / mine.count;
  const int64_t b1 = mine.alone ? mine.row_end : a.B * (mine.id + 1) / mine.count;
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t u = 0; u < H; u += 16)
      for (int64_t gate = 0; gate < 4; ++gate)
        put_row<P>(at_row<P>(a.rows[0], b / R, b % R, place(u, gate), K),
                   get(a.da + (a.first[b] * 4 + gate) * H + u, H - u));
  barrier();
  products(a.rows[0], mine.row_end, [] {}, [](int64_t) {});
  for (int64_t b = mine.row; b < mine.row_end; ++b)
    for (int64_t u = begin; u < end; u += 16) {
      nan |= is_nan(sum(b, u));
      put(a.dh0 + b * H + u, sum(b, u), H - u);
    }
  if (nan) *a.nan = true;
}

// Equal row tiles of at most 16: 50 = 13 + 13 + 13 + 11. As many for each thread, where those can
// share the rows (see can_share_rows): without a barrier a step of few rows takes half the time.
int64_t tile_rows(at::IntArrayRef sizes, double weight_bytes) {
  const int64_t B = sizes[0], tiles = (B + 15) / 16, threads = at::get_num_threads();
  const int64_t even = round_up(tiles, threads), rows = (B + even - 1) / even;
  if (can_share_rows(sizes, weight_bytes, threads) && (B + rows - 1) / rows == even) return rows;
  return (B + tiles - 1) / tiles;
}

// Runs body(T{}) with the type of the tensors' numbers.
template <typename Body> void with_type(const at::TensorOptions& like, const Body& body) {
  if (like.dtype() == at::kFloat) body(float{});
  else body(Bf16{});
}

bool serves(const at::TensorOptions& like, int64_t B, int64_t H) {
  if (kernel() != Kernel::amx) return false;
  return like.dtype() == at::kBFloat16 ||
         (like.dtype() == at::kFloat && B >= 16 && H >= 96);  // else float32 is quicker
}

}  // namespace

std::optional<Three> forward_amx(const at::Tensor& x, const at::Tensor& w_ih,
                                 const at::Tensor& bias, const at::Tensor& h0,
                                 const at::Tensor& c0, const at::Tensor& w_hh,
                                 at::IntArrayRef sizes, bool reverse, bool save) {
  const auto like = x.options(), floats = like.dtype(at::kFloat);
  const int64_t N = x.size(0), B = h0.size(0), H = h0.size(1), I = x.size(1);
  if (N == 0 || !serves(like, B, H)) return {};
  const double weight_bytes = 8.0 * (like.dtype() == at::kFloat ? 3 : 1) * H * (I + H);
  const int64_t R = tile_rows(sizes, weight_bytes);
  const int64_t blocks = (I + 31) / 32 + (H + 31) / 32, tiles = (B + R - 1) / R;
  const int64_t panels = (H + 31) / 32;
  auto h = buffer({N, H}, like), c = buffer({save ? N : 0, H}, like);
  auto gates = buffer({save ? N : 0, 4 * H}, like), c_now = buffer({B, H}, floats).copy_(c0);
  const auto x_ = x.contiguous(), w_ih_ = w_ih.contiguous(), w_hh_ = w_hh.contiguous();
  const auto h0_ = h0.contiguous(), bias_ = bias.to(at::kFloat).contiguous();
  auto sums = buffer({tiles, panels, 2, 4, kSums}, floats);
  std::atomic<bool> nan = false;
  const auto steps = walk(sizes, reverse);
  with_type(like, [&](auto type) {
    using T = decltype(type);
    constexpr int P = kParts<T>;
    auto columns = buffer({panels * 4, blocks, P, 2, kTileNumbers}, like.dtype(at::kBFloat16));
    auto rows = at::zeros({2, tiles, blocks, P, kTileNumbers}, like.dtype(at::kBFloat16));
    Forward<T> a{data<T>(x_), data<T>(w_ih_), data<T>(h0_), data<T>(w_hh_), data<float>(bias_),
                 data<T>(h), data<T>(c), save ? data<T>(gates) : nullptr, data<Bf16>(columns),
                 {data<Bf16>(rows), data<Bf16>(rows) + rows.numel() / 2}, data<float>(sums),
                 data<float>(c_now), B, I, H, R, &nan};
    team_of_tiles(panels, R, sizes, weight_bytes, [&](const TileShare& mine) {
      forward<T>(a, steps, mine);
    });
  });
  if (nan && like.dtype() == at::kFloat) return {};  // infinity has no parts
  return Three{h, save ? c : c_now.to(like.dtype()), gates};
}

std::optional<Four> backward_amx(const at::Tensor& dh, const std::optional<at::Tensor>& dc,
                                 const at::Tensor& gates, const at::Tensor& c,
                                 const at::Tensor& c0, const std::optional<at::Tensor>& w_ih,
                                 const at::Tensor& w_hh, at::IntArrayRef sizes, bool reverse) {
  const auto like = dh.options(), floats = like.dtype(at::kFloat);
  const int64_t N = dh.size(0), B = c0.size(0), H = c0.size(1), I = w_ih ? w_ih->size(1) : 0;
  if (N == 0 || !serves(like, B, H)) return {};
  const double weight_bytes = 8.0 * (like.dtype() == at::kFloat ? 3 : 1) * H * H;
  const int64_t R = tile_rows(sizes, weight_bytes);
  const int64_t blocks = (H + 15) / 16 * 2, tiles = (B + R - 1) / R, panels = (H + 31) / 32;
  auto da = buffer({N, 4 * H}, like), dx = buffer({N, I}, like), dh0 = at::zeros({B, H}, like);
  const auto dh_ = dh.contiguous(), gates_ = gates.contiguous(), c_ = c.contiguous();
  const auto c0_ = c0.contiguous(), w_hh_ = w_hh.contiguous();
  const auto dc_ = dc ? dc->contiguous() : at::Tensor();
  const auto w_ih_ = w_ih ? w_ih->contiguous() : at::Tensor();
  auto dc_now = at::zeros({B, H}, floats);
  auto sums = buffer({tiles, panels, 2, kSums}, floats);
  std::atomic<bool> nan = false;
  const auto steps = walk(sizes, reverse);
  const auto first = first_rows(steps, B);
  with_type(like, [&](auto type) {
    using T = decltype(type);
    constexpr int P = kParts<T>;
    auto columns = buffer({panels + (I + 31) / 32, blocks, P, 2, kTileNumbers},
                          like.dtype(at::kBFloat16));
    auto rows = at::zeros({2, tiles, blocks, P, kTileNumbers}, like.dtype(at::kBFloat16));
    Backward<T> a{data<T>(dh_), dc ? data<T>(dc_) : nullptr, data<T>(gates_), data<T>(c_),
                  data<T>(c0_), I ? data<T>(w_ih_) : nullptr, data<T>(w_hh_), data<T>(da),
                  data<T>(dx), data<T>(dh0), data<Bf16>(columns),
                  {data<Bf16>(rows), data<Bf16>(rows) + rows.numel() / 2}, data<float>(sums),
                  data<float>(dc_now), first.data(), B, I, H, R, &nan};
    team_of_tiles(panels, R, sizes, weight_bytes, [&](const TileShare& mine) {
      backward<T>(a, steps, mine);
    });
  });
  if (nan && like.dtype() == at::kFloat) return {};
  return Four{da, dx, dh0, dc_now.to(like.dtype())};
}

}  // namespace rnn
#else
namespace rnn {
std::optional<Three> forward_amx(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 at::IntArrayRef, bool, bool) { return {}; }
std::optional<Four> backward_amx(const at::Tensor&, const std::optional<at::Tensor>&,
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const std::optional<at::Tensor>&, const at::Tensor&,
                                 at::IntArrayRef, bool) { return {}; }
std::optional<Three> weight_gradients_amx(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                          const at::Tensor&, at::IntArrayRef, bool) { return {}; }
}  // namespace rnn
#endif
