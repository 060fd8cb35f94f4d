"""Recurrent networks in one file: cells, layers, a character language model, and the code that
trains, evaluates and samples it. It needs nothing but PyTorch. Read it from top to bottom.

`RNN`, `LSTM` and `GRU` are drop-ins for torch.nn's: same arguments, parameter names, initial values
and results. You can also read them, `trace` every gate and state, and plug in a cell of your own.

Dimensions   T  time steps (symbols in a chunk of text)    I  features that a layer reads
             B  batch (sequences side by side)             H  hidden units of a layer
             V  vocabulary (distinct symbols)              G  blocks of H: RNN 1, GRU 3, LSTM 4
             L  symbols of a whole text                    P  width of a projected h (proj_size)
             N  rows: one per step of each sequence, T * B if all sequences are equally long

Equations    x input, h hidden state, c cell state, ' new value, * elementwise product. For all
             gates at once a = W_ih x + b_ih + W_hh h + b_hh with W_ih (G*H, I) and W_hh (G*H, H).
             H rows of a belong to each gate, in the order i f g o or r z n:
  RNN        h' = tanh(a)  or  relu(a)
  LSTM       i = sigmoid(a_i);  f = sigmoid(a_f)        input gate, forget gate
             g = tanh(a_g);     o = sigmoid(a_o)        candidate, output gate
             c' = f * c + i * g                         forget some, add some (where f is near 1,
                                                        gradients flow back through c undiminished)
             h' = o * tanh(c')                          show some; projected: W_hr (o * tanh(c'))
  GRU        r = sigmoid(a_r);  z = sigmoid(a_z)        reset gate, update gate
             n = tanh(W_in x + b_in + r * (W_hn h + b_hn))    W_in: the last H rows of W_ih, ...
             h' = (1 - z) * n + z * h                   renew some, keep some

Units        Loss: nats per symbol. Perplexity: exp(loss). Bits per character (bpc): loss / ln 2.
"""

import contextlib
import hashlib
import math
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence

# ---- Cells: one step in time, as pure functions ----------------------------------------------
# A cell takes gx = W_ih x + b_ih (B, G*H), computed beforehand; the state, a tuple (h,) or (h, c);
# and p, its layer's parameters by name: in layer 0 p.weight_hh is weight_hh_l0. It returns a dict:
# the new h (and c) first, then whatever you may want to look at, such as the gates.

def rnn_step(gx, state, p):
    """Elman 1990."""
    (h,) = state  # (B, H)
    a = gx + F.linear(h, p.weight_hh, p.bias_hh)  # (B, H)
    return {"h": {"tanh": torch.tanh, "relu": torch.relu}[p.nonlinearity](a)}


def project(h, p):
    """Sak et al. 2014: a narrower h makes W_hh smaller. (B, H) -> (B, P)"""
    return h if p.weight_hr is None else F.linear(h, p.weight_hr)


def lstm_step(gx, state, p):
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000."""
    h, c = state  # (B, H) each; with a projection h is (B, P)
    i, f, g, o = (gx + F.linear(h, p.weight_hh, p.bias_hh)).chunk(4, dim=-1)  # 4 x (B, H)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return {"h": project(o * c.tanh(), p), "c": c, "i": i, "f": f, "g": g, "o": o}


def gru_step(gx, state, p):
    """Cho et al. 2014, in torch's and cuDNN's form: r acts after the product with W_hn."""
    (h,) = state  # (B, H)
    xr, xz, xn = gx.chunk(3, dim=-1)  # 3 x (B, H)
    hr, hz, hn = F.linear(h, p.weight_hh, p.bias_hh).chunk(3, dim=-1)  # 3 x (B, H)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return {"h": (1 - z) * n + z * h, "r": r, "z": z, "n": n}


class Parameters:
    """The parameters of one direction of one layer, as attributes."""

    weight_hr = bias_ih = bias_hh = nonlinearity = None  # not every layer has these

    def __init__(self, **values):  # torch.compile cannot see through a SimpleNamespace
        self.__dict__.update(values)


# ---- The loop over time ----------------------------------------------------------------------

def scan(step, rows, state, p, reverse=False, keep=False):
    """Run one cell over time, for sequences of any lengths.

    rows[t] (B_t, G*H) holds step t of every sequence that has one, the longest sequence first, as
    in torch's PackedSequence. With sequences a, b, c of 3, 2 and 1 steps:

        rows  [a0 b0 c0], [a1 b1], [a2]          equally long sequences: T times (B, G*H)

    state: a tuple of (B, H); reverse: from the last step to the first; keep: return all that the
    cell returns, not only h. Returns {"h": [T times (B_t, H)], ...} and the final state."""
    kept = [None] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        # Only the first `alive` sequences have a step t. The others, which have ended (or, in
        # reverse, not begun), keep their state.
        alive, B = rows[t].shape[0], state[0].shape[0]
        new = step(rows[t], state if alive == B else tuple(s[:alive] for s in state), p)
        # new begins with h (and c), and zip ends where state does: before the gates.
        state = tuple(new[name] if alive == B else torch.cat((new[name], s[alive:]))
                      for name, s in zip(new, state))
        kept[t] = new if keep else {"h": new["h"]}
    return {name: [new[name] for new in kept] for name in kept[0]}, state


def map_state(function, *states):
    """Apply a function to the h, and for LSTM to the c, of one or several states at once."""
    if isinstance(states[0], torch.Tensor):
        return function(*states)
    return tuple(function(*parts) for parts in zip(*states))


# ---- The fused LSTM, optional ----------------------------------------------------------------
# csrc/ computes the same loop in C++ or CUDA, faster. The environment variable RNN_KERNEL names one
# of its kernels (see csrc/README.md), or "plain" for none.

KERNEL = os.environ.get("RNN_KERNEL", "")
fused = None  # csrc/__init__.py as a module, once it is loaded
with contextlib.suppress(ModuleNotFoundError):  # only setup.py installs this module
    import rnn_C
    fused = rnn_C.load(KERNEL)  # None, and a warning, if it was built for another torch or CPU


def build():
    """Compile csrc/, unless that has been done, and use it from now on. It takes a C++ compiler,
    ninja and half a minute; torch caches the result. Raises RuntimeError or ImportError."""
    global fused
    if not fused and KERNEL != "plain":
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        import csrc
        fused = csrc.compile_and_load(KERNEL)


# ---- Layers: drop-ins for torch.nn.RNN, LSTM, GRU --------------------------------------------

class Recurrent(nn.RNNBase):
    """Layers of one cell, stacked, in one or both directions. The arguments are torch.nn's.

    torch.nn.RNNBase brings the parameters, their initial values, and the checks of arguments and
    shapes. This class adds the forward pass, which torch hides in C++. The parameters of layer
    k, where layer 0 reads I features and the others the h of the layer below, of both directions:

        weight_ih_l{k} (G*H, I)    weight_hh_l{k} (G*H, H)    bias_ih_l{k}, bias_hh_l{k} (G*H,)
        weight_hr_l{k} (P, H) if proj_size=P: h is P wide, W_hh (G*H, P)    ..._reverse: backward

    For a cell of your own, derive from RNN, GRU or LSTM: the one with as many gates and states. Set
    step = staticmethod(my_step), and in `extra` name more parameters: vectors, n * H long."""

    kind, step, states = None, None, 1  # torch's name of the cell; the cell; 1 for h, 2 for (h, c)
    extra = {}  # {"weight_peep": 3}: in every layer and direction p.weight_peep is (3 * H,)
    variational = False  # True: dropout between layers draws one mask for all steps of a sequence

    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs and self.kind != "LSTM":
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(self.kind, *args, **kwargs)
        for names in self._all_weights:  # of each layer and direction
            for name, n in self.extra.items():
                names.append(name + names[0].removeprefix("weight_ih"))
                value = self.weight_ih_l0.new_empty(n * self.hidden_size)
                setattr(self, names[-1], nn.Parameter(value))
        if self.extra:
            self.reset_parameters()

    def forward(self, input, hx=None):
        """input: (T, B, I), with batch_first (B, T, I), one sequence (T, I), or a PackedSequence.
        hx, and the state returned: (num_layers * directions, B, H), or without B for one sequence;
        LSTM has a tuple of two, (h, c). None means zeros. Returns output and state; output is the
        last layer's h at every step, (T, B, directions * H), laid out as the input. Errors have
        torch.nn's types, ValueError and RuntimeError; they name one sequence's sizes with B = 1."""
        return self.trace(input, hx, keep=False)[:2]

    def trace(self, input, hx=None, keep=True):
        """As forward, with a third result: a list with a dict for each layer and direction, in the
        state's order: {"h": (T, B, H), ...}, all that the cell returned, laid out as the input. A
        loss may use any of it. Do not change it in place: the output may be the last "h"."""
        x, sizes, state = self._prepare(input, hx)  # x (T, B, I), or packed rows (N, I)
        directions = 2 if self.bidirectional else 1
        ends, traces = [], []
        for k in range(self.num_layers):
            x = self._drop(x, sizes) if k > 0 else x
            outputs = []
            for n in range(k * directions, (k + 1) * directions):
                p = Parameters(nonlinearity=getattr(self, "nonlinearity", None),
                               **{name.rpartition("_l")[0]: getattr(self, name)  # weight_ih, ...
                                  for name in self._all_weights[n]})
                start = tuple(s[n] for s in state)  # (B, H) each
                computed, end = self._direction(x, sizes, start, p, n % directions == 1, keep)
                outputs.append(computed["h"])  # (T, B, H)
                ends.append(end)
                traces.append({name: self._as_input(input, v) for name, v in computed.items()})
            x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        state = tuple(torch.stack(s) for s in zip(*ends))  # (layers * directions, B, H) each
        state = state if self.states == 2 else state[0]
        if isinstance(input, PackedSequence):  # back into the caller's order
            state = self.permute_hidden(state, input.unsorted_indices)
        elif input.dim() == 2:
            state = map_state(lambda s: s[:, 0], state)
        return self._as_input(input, x), state, traces

    def _direction(self, x, sizes, state, p, reverse, keep):
        """One direction of one layer: x (T, B, I) -> {"h": (T, B, H), ...} and the final state. The
        product with W_ih does not need the state: it is one large product for all steps."""
        gx = F.linear(x, p.weight_ih, p.bias_ih)  # (T, B, G*H), or packed (N, G*H)
        rows = gx.unbind() if sizes is None else gx.split(sizes)
        computed, state = scan(self.step, rows, state, p, reverse, keep)
        join = torch.stack if sizes is None else torch.cat
        return {name: join(steps) for name, steps in computed.items()}, state

    def _drop(self, x, sizes):  # between layers
        if not self.variational:
            return F.dropout(x, self.dropout, self.training)
        first = x[0] if sizes is None else x[: sizes[0]]  # (B, H)
        mask = F.dropout(torch.ones_like(first), self.dropout, self.training)
        return x * (mask if sizes is None else torch.cat([mask[:n] for n in sizes]))

    def _prepare(self, input, hx):
        """Check input and state, and bring the four layouts into two: x (T, B, I) and sizes None,
        or packed x (N, I) and sizes, the number of rows at each step. The state is a tuple."""
        torch.compiler.is_exporting() or self._update_flat_weights()  # check_forward_args reads it
        x, sizes, order, batch_dim = input, None, None, 0 if self.batch_first else 1
        if isinstance(input, PackedSequence):
            x, sizes, order, _ = input
        elif input.dim() == 2:  # one sequence is a batch of one
            x = input.unsqueeze(batch_dim)
            hx = None if hx is None else map_state(lambda s: s.unsqueeze(1), hx)
        elif input.dim() != 3:
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, "
                             f"got {input.dim()}D instead")
        if hx is None:
            B = x.shape[batch_dim] if sizes is None else int(sizes[0])
            layers = self.num_layers * (2 if self.bidirectional else 1)
            h = x.new_zeros(layers, B, self.proj_size or self.hidden_size)
            hx = h if self.states == 1 else (h, x.new_zeros(layers, B, self.hidden_size))
        else:
            hx = self.permute_hidden(hx, order)  # into the packed order, if packed
        self.check_forward_args(x, hx, sizes)
        if sizes is None and self.batch_first:
            x = x.transpose(0, 1)  # (T, B, I)
        if len(x) == 0 and sizes is None:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return x, sizes if sizes is None else sizes.tolist(), hx if self.states == 2 else (hx,)

    def _as_input(self, input, x):
        """A result for every step, (T, B, H) or (N, H), laid out as the input."""
        if isinstance(input, PackedSequence):
            return PackedSequence(x, *input[1:])
        if input.dim() == 2:
            return x[:, 0]
        return x.transpose(0, 1) if self.batch_first else x


class RNN(Recurrent):
    step = staticmethod(rnn_step)

    def __init__(self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", *args, **kwargs):
        self.kind, self.nonlinearity = f"RNN_{nonlinearity.upper()}", nonlinearity
        super().__init__(input_size, hidden_size, num_layers, *args, **kwargs)


class GRU(Recurrent):
    kind, step = "GRU", staticmethod(gru_step)


class LSTM(Recurrent):
    kind, step, states = "LSTM", staticmethod(lstm_step), 2
    check_forward_args = nn.LSTM.check_forward_args  # RNNBase's expect a tensor, not (h, c)
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden

    def _direction(self, x, sizes, state, p, reverse, keep):
        """Uses csrc/ where it can: for lstm_step without projection, and if no gates are wanted."""
        if KERNEL not in ("", "plain") and not fused:
            raise RuntimeError(f"RNN_KERNEL={KERNEL}, but csrc/ is not built: call rnn.build()")
        same_cell = self.step is lstm_step and not self.proj_size and not keep
        if same_cell and fused and fused.can_run(x, sizes, state, p):
            h, end = fused.lstm(x, sizes, state, p, reverse, super()._direction)
            return {"h": h}, end
        return super()._direction(x, sizes, state, p, reverse, keep)


# ---- Cell modules: drop-ins for torch.nn.RNNCell, LSTMCell, GRUCell --------------------------

class OneStep:
    weight_hr = None  # no projection, and no extra parameters

    def forward(self, input, hx=None):
        """input (B, I) or (I,); hx (B, H) or (H,), for LSTM a tuple (h, c), None means zeros.
        Returns the new state. Raises ValueError for dimensions, RuntimeError for sizes."""
        lstm = isinstance(self, nn.LSTMCell)
        zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
        hx = (zeros, zeros)[: 2 if lstm else 1] if hx is None else tuple(hx) if lstm else (hx,)
        if not all(value.dim() in (1, 2) for value in (input, *hx)):
            raise ValueError(f"{type(self).__name__}: Expected input and hx to be 1D or 2D, got "
                             f"{[value.dim() for value in (input, *hx)]}")
        if not all(h.shape == zeros.shape for h in hx):  # a batch of one would broadcast
            raise RuntimeError(f"{type(self).__name__}: Expected hx of size {tuple(zeros.shape)}, "
                               f"got {[tuple(h.shape) for h in hx]}")
        new = self.step(F.linear(input, self.weight_ih, self.bias_ih), hx, self)  # self is its p
        return (new["h"], new["c"]) if lstm else new["h"]


class RNNCell(OneStep, nn.RNNCell):
    step = staticmethod(rnn_step)


class LSTMCell(OneStep, nn.LSTMCell):
    step = staticmethod(lstm_step)


class GRUCell(OneStep, nn.GRUCell):
    step = staticmethod(gru_step)


# ---- Text: symbols, and batches of them ------------------------------------------------------

class Vocab:
    """Symbols <-> indices. A text is a str of characters, or a list of str such as words. Unknown
    symbols become "<unk>" if the vocabulary has it; otherwise they are a ValueError."""

    def __init__(self, symbols):
        self.symbols = list(symbols)
        self.index = {symbol: k for k, symbol in enumerate(self.symbols)}
        if not self.symbols or len(self.index) < len(self.symbols):
            raise ValueError("a vocabulary needs at least one symbol, and none of them twice")

    @classmethod
    def of(cls, text):
        return cls(sorted(set(text)))

    def __len__(self):
        return len(self.symbols)

    def encode(self, text):
        """A text of L symbols -> LongTensor (L,)."""
        unknown = self.index.get("<unk>")
        missing = sorted(set(text) - self.index.keys()) if unknown is None else []
        if missing:
            raise ValueError(f"{len(missing)} symbols are not in the vocabulary: {missing[:10]}")
        return torch.tensor([self.index.get(symbol, unknown) for symbol in text], dtype=torch.long)

    def decode(self, ids):
        """Indices (L,) -> str."""
        ids = torch.as_tensor(ids).tolist()
        if min(ids, default=0) < 0:  # Python would count from the end
            raise ValueError(f"an index must be at least 0, got {min(ids)}")
        return "".join(self.symbols[k] for k in ids)


class Batches:
    """Endless chunks of a text, ids (L,), on the device of ids. `next()` returns x and y (B, T): y
    holds the symbol that follows each symbol of x.

    order="sequential": row b starts at symbol b * (L // B), and every batch continues the rows of
    the one before, so that the state can be carried over. order="random": windows from anywhere."""

    def __init__(self, ids, batch, context, order="sequential", seed=0):
        self.ids, self.batch, self.context, self.order = torch.as_tensor(ids), batch, context, order
        needed = (batch if order == "sequential" else 1) * context + 1
        if order not in ("sequential", "random") or min(batch, context, len(ids) - needed + 1) < 1:
            raise ValueError(f"{batch=}, {context=} (at least 1) and {order=} ('sequential' or "
                             f"'random') need a text of {needed} symbols, got {len(ids)}")
        self.position = 0  # how far every row has been read, in symbols
        self.random = torch.Generator().manual_seed(seed)

    def next(self):
        L = len(self.ids)
        if self.order == "sequential":
            first = torch.arange(self.batch) * (L // self.batch) + self.position  # (B,)
            self.position = (self.position + self.context) % L
        else:
            first = torch.randint(L - self.context, (self.batch,), generator=self.random)  # (B,)
        where = (first[:, None] + torch.arange(self.context + 1)) % L  # (B, T + 1)
        chunk = self.ids[where.to(self.ids.device)]
        return chunk[:, :-1], chunk[:, 1:]


# ---- The character language model ------------------------------------------------------------

CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}  # add your own: CELLS["peep"] = PeepholeLSTM


class CharLM(nn.Module):
    """Predicts the next symbol at every step: embedding, recurrent layers, output.
    dropout acts between layers and before the output, embed_dropout, by default as large, on the
    embedding. variational: one mask for all steps (Gal & Ghahramani 2016). one_hot: one-hot
    vectors, no embedding. tie: the embedding is also the output matrix (Press & Wolf 2017)."""

    def __init__(self, vocab_size, embed=64, hidden=256, layers=1, cell="lstm", dropout=0.0,
                 embed_dropout=None, variational=False, one_hot=False, tie=False):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got '{cell}'")
        if tie and (one_hot or embed != hidden):
            raise ValueError(f"tie needs embed == hidden, got {embed=}, {hidden=}, {one_hot=}")
        self.vocab_size = vocab_size
        self.embedding = None if one_hot else nn.Embedding(vocab_size, embed)
        self.embed_dropout = nn.Dropout(dropout if embed_dropout is None else embed_dropout)
        self.rnn = CELLS[cell](vocab_size if one_hot else embed, hidden, layers,
                               dropout=dropout if layers > 1 else 0.0)
        self.rnn.variational = variational
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, vocab_size)
        if tie:
            self.embedding.weight = self.output.weight

    def forward(self, ids, state=None):
        """ids (B, T) -> logits (B, T, V) and the state after the last step, as from self.rnn."""
        x = self._drop(self.embed(ids.transpose(0, 1)), self.embed_dropout)  # (T, B, I)
        x, state = self.rnn(x, state)  # (T, B, H)
        return self.output(self._drop(x, self.dropout)).transpose(0, 1), state

    def embed(self, ids):  # (...) -> (..., I)
        if self.embedding is None:
            return F.one_hot(ids, self.vocab_size).to(self.output.weight.dtype)
        return self.embedding(ids)

    def _drop(self, x, dropout):  # variational: a mask (1, B, features) for all T
        return x * dropout(torch.ones_like(x[:1])) if self.rnn.variational else dropout(x)

    def init_state(self, batch):
        """The state before the first symbol, zeros: (layers, B, H), for LSTM a tuple of two."""
        zeros = self.output.weight.new_zeros(self.rnn.num_layers, batch, self.rnn.hidden_size)
        return (zeros, zeros.clone()) if self.rnn.states == 2 else zeros


@torch.no_grad()
def initialize(module):
    """Initial values for training, of the matrices and biases of every recurrent and Linear layer,
    each gate's block on its own. Recurrent weights are orthogonal, to neither shrink nor stretch
    the state (Saxe et al. 2014), other matrices Xavier (Glorot & Bengio 2010). Biases are 0, but 1
    for the LSTM's forget gate, which should remember at first (Jozefowicz et al. 2015): in b_ih
    only, for b_hh is added to it. Returns the module. Raises ValueError under weight_norm."""
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.RNNBase | nn.RNNCellBase):
            continue
        if nn.utils.parametrize.is_parametrized(layer) or layer._forward_pre_hooks:
            raise ValueError(f"initialize {layer} before weight_norm or other hooks are added")
        H = layer.out_features if isinstance(layer, nn.Linear) else layer.hidden_size
        for name, value in layer.named_parameters(recurse=False):
            blocks = value.chunk(max(1, len(value) // H))  # one per gate; W_hr has P < H rows
            if name.startswith("bias"):
                nn.init.zeros_(value)
                if name.startswith("bias_ih") and len(blocks) == 4:
                    nn.init.ones_(blocks[1])  # i, f, g, o
            elif value.dim() == 2:
                recurrent = name.startswith("weight_hh")
                for block in blocks:  # (H, I), (H, H) or (H, P)
                    (nn.init.orthogonal_ if recurrent else nn.init.xavier_uniform_)(block)
    return module


# ---- Training --------------------------------------------------------------------------------

def cross_entropy(logits, targets, reduction="mean"):
    """Mean nats per symbol, or with reduction="sum" their sum: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def learning_rate(lr, warmup, step, done):
    """The rate of a step: lr times a rise over the first `warmup` steps, times half a cosine that
    falls from 1 to 0.03. done: the part of the run that is over, from 0 to 1."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return lr * rise * (0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model, weight_decay=0.01):
    """AdamW (Loshchilov & Hutter 2019). Matrices decay; vectors, such as biases, do not."""
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]},
              {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def backward(model, x, y, state, accumulate=1, dtype=torch.float32):
    """Add the gradient of the mean loss on one batch, x and y (B, T), to the parameters' .grad. To
    save memory, accumulate=4 takes a quarter of the rows at a time. dtype: bfloat16 is autocast.

    Returns the loss and the state after the batch, detached. That truncates backpropagation through
    time (BPTT, Williams & Peng 1990): the next batch does not backpropagate into this one."""
    loss, ends = 0.0, []
    for k, (xk, yk) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate))):
        start = map_state(lambda s: s.chunk(accumulate, dim=1)[k], state)  # (layers, part of B, H)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits, end = model(xk, start)
        part = cross_entropy(logits, yk) * (len(xk) / len(x))
        part.backward()
        loss += part.detach()
        ends.append(map_state(torch.Tensor.detach, end))
    return loss, map_state(lambda *s: torch.cat(s, dim=1), *ends)


def train(model, batches, steps, lr=4e-3, warmup=20, weight_decay=0.01, clip=1.0, accumulate=1,
          dtype=torch.float32):
    """The training loop, as a generator: after every step it yields the step's number, from 1 on,
    the loss in nats per symbol and the norm of its gradient. What happens in between is up to you:

        for step, loss, norm in rnn.train(model, rnn.Batches(ids, batch=32, context=64), 1000):
            if step % 100 == 0:
                print(step, loss, rnn.evaluate(model, held_out))
                rnn.save("model.pt", model, vocab)

    clip: the largest norm of a gradient; over many steps it may explode (Pascanu et al. 2013).
    Raises FloatingPointError, before the weights change, if the loss or norm is not finite."""
    optimizer = make_optimizer(model, weight_decay)
    state = model.init_state(batches.batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, warmup, step, step / steps)
        x, y = batches.next()  # (B, T) each
        if batches.order == "random":
            state = model.init_state(len(x))
        optimizer.zero_grad()
        loss, state = backward(model, x, y, state, accumulate, dtype)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"step {step + 1}: loss {loss:g}, norm {norm:g}: lower lr?")
        optimizer.step()
        yield step + 1, float(loss), float(norm)


# ---- Evaluation and sampling -----------------------------------------------------------------

@contextlib.contextmanager
def evaluating(model):
    """No dropout and no gradients inside the block. Afterwards every module's mode is as before."""
    in_training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module in in_training:
            module.training = True


def evaluate(model, ids, batch=64, context=256):
    """The exact loss on a text, ids (L,), in nats per symbol: the state is carried from the first
    symbol to the last, and all L - 1 predictions count. FloatingPointError if it is not finite.

    For speed the text is cut into `batch` pieces, read side by side. Each piece should start from
    the state in which the piece before it ends, which is not known yet. Networks forget, so the
    last symbols of each piece, read from zeros, give a first guess. Then all pieces are read from
    the ends just found, until those no longer change: mostly once, at most `batch` times."""
    if min(len(ids) - 1, batch, context) < 1:
        raise ValueError(f"needs 2 symbols, {batch=} and {context=} above 0, got {len(ids)}")
    length = math.ceil((len(ids) - 1) / batch)
    batch = math.ceil((len(ids) - 1) / length)  # so that no piece is empty
    missing = batch * length - (len(ids) - 1)  # at the end of the last piece
    x = F.pad(ids[:-1], (0, missing)).view(batch, length)  # (B, length)
    y = F.pad(ids[1:], (0, missing), value=-100).view(batch, length)  # -100: costs nothing
    with evaluating(model):
        start = model.init_state(batch)
        for n in range(batch + 1):
            skip = 0 if n > 0 else max(0, length - 2 * context)
            total, end = 0.0, start
            for xk, yk in zip(x[:, skip:].split(context, 1), y[:, skip:].split(context, 1)):
                logits, end = model(xk, end)
                total += float(cross_entropy(logits, yk, reduction="sum"))
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss is {total}: are all weights finite?")
            # The first piece starts from zeros, each other one where the one before has ended.
            last, start = start, map_state(lambda s: F.pad(s[:, :-1], (0, 0, 1, 0)), end)
            same = map_state(lambda s, t: (s - t).abs().max() <= 1e-5 * t.abs().max(), start, last)
            if skip == 0 and all(same if isinstance(same, tuple) else [same]):
                break
    return total / (len(ids) - 1)


def perplexity(model, ids, batch=64):
    """exp(loss): as uncertain as a choice among so many symbols, all equally likely."""
    return torch.tensor(evaluate(model, ids, batch), dtype=torch.float64).exp().item()


def generate(model, vocab, prompt="", length=500, temperature=1.0, top_k=None, seed=None):
    """Yields `length` symbols that follow the prompt; an empty one stands for a newline, or for
    symbol 0 if there is none. temperature divides the logits; 0 takes the likeliest. top_k: draw
    from the k likeliest. next() raises ValueError (bad arguments) or FloatingPointError."""
    if not 0 <= temperature < math.inf or length < 0 or (top_k is not None and top_k < 1):
        raise ValueError("temperature must be 0 or more and finite, length 0 or more, top_k at "
                         f"least 1; got {temperature=}, {length=}, {top_k=}")
    state, random = None, torch.Generator()  # on the CPU: the same draw on every device
    random.seed() if seed is None else random.manual_seed(seed)
    ids = vocab.encode(prompt) if prompt else torch.tensor([vocab.index.get("\n", 0)])
    for _ in range(length):
        with evaluating(model):  # not around the loop: in between, the caller's code runs
            logits, state = model(ids[None].to(model.output.weight.device), state)  # (1, T, V)
        logits = logits[0, -1].cpu().double()  # (V,)
        if not logits.isfinite().all():
            raise FloatingPointError("the logits are not finite: are all weights finite?")
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -math.inf
        if temperature == 0:
            ids = logits.argmax(keepdim=True)  # (1,)
        else:
            chances = (logits / max(temperature, 1e-100)).softmax(-1)  # never divide by 0
            ids = torch.multinomial(chances, 1, generator=random)  # (1,)
        yield vocab.symbols[ids]


# ---- Checkpoints -----------------------------------------------------------------------------

def save(path, model, vocab, **training):
    """Write a CharLM, its vocabulary, and what else training needs to resume. The file gets its
    name only after `load` has read it back: a save that fails leaves an earlier checkpoint as is.
    Raises OSError that names the path, TypeError, or load's ValueError."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if type(model) is not CharLM:
        raise TypeError(f"save and load know CharLM, got {type(model).__name__}")
    path = os.path.realpath(path)  # a symbolic link stays one
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save({"config": model.config, "weights": model.state_dict(),
                        "symbols": vocab.symbols, "training": training}, file)
        with open(partial, "rb+", buffering=0) as file:
            file.write(hashlib.sha256(file.read()).digest())  # 32 bytes; torch.load ignores them
            os.fsync(file.fileno())
        load(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def load(path, device="cpu"):
    """Read a checkpoint: model, vocabulary, and the dict of what else training saved. Nothing in it
    is executed. Raises OSError, or ValueError if stored data is damaged or it is no checkpoint."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise ValueError("its bytes do not fit its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, weights, vocab = content["config"], content["weights"], Vocab(content["symbols"])
        if len(vocab) != config["vocab_size"] or len(weights) < config["layers"]:
            raise ValueError(f"{len(vocab)} symbols and {len(weights)} weights do not fit {config}")
        with torch.device("meta"):  # no memory, no random numbers: the weights are in the file
            model = CharLM(**config)
        model.load_state_dict(weights, assign=True)
        if config["tie"]:
            model.embedding.weight = model.output.weight
    except Exception as error:  # torch.load raises many kinds for damaged files
        raise ValueError(f"{path} is damaged or not a checkpoint of rnn.py: {error}") from error
    return model.to(device), vocab, content["training"]
