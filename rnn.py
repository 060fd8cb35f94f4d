"""Recurrent networks in one file: cells, layers, models, training and sampling in pure PyTorch.

`rnn.RNN`, `rnn.LSTM` and `rnn.GRU` take the place of torch.nn's: the same arguments, parameter
names, gate order, initial values, shapes and results. To be read from top to bottom: cells and
layers, which are the networks; models made of them; then what one does with these. Passages marked
(skip) serve speed, safety and torch.nn's interface: on a first reading leave them out.

Dimensions   T  time steps (symbols in a chunk of text)    I  features that a layer reads
             B  batch (sequences side by side)             H  hidden units of a layer
             V  vocabulary (distinct symbols)              G  gates: 1 in RNN, 3 in GRU, 4 in LSTM
             N  rows, one per step of each sequence: T * B when all are equally long
             P  width of h in an LSTM with projection (proj_size); else h is H wide, as c is
             L  symbols of a whole text                        M  symbols of a target sequence

Equations    x input, h hidden state, c cell state, ' new value, * elementwise product. For all
             gates at once a = W_ih x + b_ih + W_hh h + b_hh with W_ih (G*H, I) and W_hh (G*H, H),
             projected (G*H, P). H rows of a belong to each gate, in the order i f g o or r z n:
  RNN        h' = tanh(a)  or  relu(a)
  LSTM       i = sigmoid(a_i);  f = sigmoid(a_f)        input gate, forget gate
             g = tanh(a_g);     o = sigmoid(a_o)        candidate, output gate
             c' = f * c + i * g                         forget some, add some (where f is near 1,
                                                        gradients go back through c undiminished)
             h' = o * tanh(c')                          show some; projected: W_hr (o * tanh(c'))
  GRU        r = sigmoid(a_r);  z = sigmoid(a_z)        reset gate, update gate
             n = tanh(W_in x + b_in + r * (W_hn h + b_hn))    W_in: the last H rows of W_ih, ...
             h' = (1 - z) * n + z * h                   renew some, keep some

Units        Loss: nats per symbol. Perplexity: exp(loss). Bits per character (bpc): loss / ln 2.

Sources      RNN: Elman 1990. LSTM: Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000;
projection: Sak et al. 2014. GRU: Cho et al. 2014. Truncated backpropagation through time (BPTT):
Williams & Peng 1990. Clipping: Pascanu et al. 2013. Initial values: Glorot & Bengio 2010, Saxe et
al. 2014; forget bias: Jozefowicz et al. 2015. AdamW: Loshchilov & Hutter 2019. Weight tying: Press
& Wolf 2017. Character models: Karpathy's char-rnn and nanoGPT.
"""

import contextlib
import importlib.util
import math
import os
import re
import sys
import warnings
import zipfile
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

# ----------------------------------------------------------------------------------------------
# Cells: one step in time, as pure functions
#
# A cell takes gx, the input already multiplied: W_ih x + b_ih for all gates, (B, G*H); the state,
# a tuple, (h,) or (h, c); and p, the parameters of its layer as attributes by torch's names. It
# returns a dict that begins with the new state, in order, followed by the gates. So a cell of your
# own is one short function, and what happens inside can be looked at: see `RNNBase.trace`.
# (Only inside is a state always a tuple. Layers take and return it as torch.nn's: RNN and GRU as
# the tensor h, LSTM as the tuple (h, c).)


def rnn_step(gx, state, p):
    (h,) = state  # (B, H)
    a = gx + F.linear(h, p.weight_hh, p.bias_hh)  # (B, H)
    return {"h": a.tanh() if p.nonlinearity == "tanh" else a.relu()}


def lstm_step(gx, state, p):
    h, c = state  # (B, H) each; with a projection h is (B, P)
    i, f, g, o = (gx + F.linear(h, p.weight_hh, p.bias_hh)).chunk(4, dim=-1)  # 4 x (B, H)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return {"h": project(o * c.tanh(), p), "c": c, "i": i, "f": f, "g": g, "o": o}


def project(h, p):
    return h if p.weight_hr is None else F.linear(h, p.weight_hr)  # (B, H) -> (B, P)


def gru_step(gx, state, p):
    """torch's (and cuDNN's) form: the reset gate acts after the product with W_hn."""
    (h,) = state  # (B, H)
    xr, xz, xn = gx.chunk(3, dim=-1)  # 3 x (B, H)
    hr, hz, hn = F.linear(h, p.weight_hh, p.bias_hh).chunk(3, dim=-1)  # 3 x (B, H)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return {"h": (1 - z) * n + z * h, "r": r, "z": z, "n": n}


def original_gru_step(gx, state, p):
    """The form of Cho et al. 2014: the reset gate acts on h, before the product with W_hn."""
    (h,) = state  # (B, H)
    H = h.shape[-1]
    if p.bias_hh is not None:
        gx = gx + p.bias_hh  # in this form the two biases only ever appear as their sum
    a = gx[:, : 2 * H] + F.linear(h, p.weight_hh[: 2 * H])  # (B, 2H)
    r, z = a.sigmoid().chunk(2, dim=-1)  # 2 x (B, H)
    n = (gx[:, 2 * H :] + F.linear(r * h, p.weight_hh[2 * H :])).tanh()  # (B, H)
    return {"h": (1 - z) * n + z * h, "r": r, "z": z, "n": n}


class Parameters:
    """The parameters of one direction of one layer, as attributes."""

    def __init__(self, **values):  # torch.compile cannot see through a SimpleNamespace
        self.__dict__.update(values)


def scan(step, gx, sizes, state, p, reverse=False, keep=False):
    """Run one cell over time, for sequences of any lengths.

    The steps are blocks of rows, one below the other: block t holds step t of every sequence that
    has one, the longest sequence first (torch's PackedSequence). With a, b, c of 3, 2 and 1 steps:

        rows  a0 b0 c0 | a1 b1 | a2        sizes  [3, 2, 1]        equally long: sizes = [B] * T

    gx (N, G*H); sizes: T ints, the rows of each step; state: a tuple of (B, H), for h (B, P) with
    projection; reverse: walk from the last step to the first; keep: return all that the cell
    computed at every step, not only h. Returns {"h": (N, H or P), ...} and the final state.
    """
    rows = gx.split(sizes)  # T x (sizes[t], G*H)
    kept = [None] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        # Only the first `alive` sequences have a step t. The others keep their state: their last
        # one if they have ended, their first one if (in reverse) they are still to begin.
        alive, B = sizes[t], len(state[0])
        new = step(rows[t], state if alive == B else tuple(s[:alive] for s in state), p)
        # new begins with h (and c), and zip ends where state does: before the gates.
        state = tuple(new[name] if alive == B else torch.cat((new[name], s[alive:]))
                      for name, s in zip(new, state))
        kept[t] = new if keep else {"h": new["h"]}
    return {name: torch.cat([new[name] for new in kept]) for name in kept[0]}, state


# ----------------------------------------------------------------------------------------------
# Layers: drop-ins for torch.nn.RNN, LSTM, GRU
#
# forward -> _run -> for each layer and direction: _direction -> scan -> step, the cell. Before that
# `_as_rows` and `_initial_state` check the input and bring its four layouts into one.


class RNNBase(nn.Module):
    """Layers of one cell, stacked, in one or both directions. Arguments and errors as in torch.nn:
    TypeError and ValueError for the arguments, these and RuntimeError for the input and state.

    To run a cell of your own through every option, derive from RNN, LSTM or GRU and replace `step`,
    as a staticmethod, and `gates` and `states` if they differ; for further parameters add their
    shapes to what `shapes` returns.
    """

    step, gates, states = None, 1, 1  # the cell; its gate blocks; 1 for the state h, 2 for (h, c)
    nonlinearity = "tanh"
    variational = False  # set it to True for dropout by one mask for all steps of a sequence

    def __init__(self, input_size, hidden_size, num_layers=1, bias=True, batch_first=False,
                 dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self._check_arguments()
        self.directions = 2 if bidirectional else 1
        self.output_size = proj_size or hidden_size  # of one direction
        for k in range(num_layers):
            reads = input_size if k == 0 else self.output_size * self.directions
            for d in range(self.directions):
                for name, shape in self.shapes(reads).items():
                    value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    setattr(self, name + self._suffix(k, d), value)
        self.reset_parameters()

    def _suffix(self, k, d):
        """What the names of parameters in layer k, direction d, end with."""
        return f"_l{k}_reverse" if d else f"_l{k}"

    def shapes(self, reads):
        """The parameters of one direction of a layer whose input has `reads` features."""
        rows = self.gates * self.hidden_size
        shapes = {"weight_ih": (rows, reads), "weight_hh": (rows, self.output_size)}
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes |= {"weight_hr": (self.proj_size, self.hidden_size)}
        return shapes

    def reset_parameters(self):
        """torch's initial values: uniform within 1/sqrt(H), in the order of registration."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def forward(self, input, hx=None):
        """input: (T, B, I), with batch_first (B, T, I), one sequence (T, I), or a PackedSequence.
        hx, and the state returned: (num_layers * directions, B, H), for one sequence without B,
        for LSTM a tuple (h, c); absent means zeros. Returns output and state; the output holds the
        last layer's hidden state at every step, (T, B, directions * H), laid out as the input.
        With projection every h, also in the output, is P wide instead of H."""
        return self._run(input, hx, keep=False)[:2]

    def trace(self, input, hx=None):
        """As forward, with a third result: a list, in the order of the state, with all that each
        layer's cell computed in each direction: {"h": (T, B, H), ...} with cell states and gates
        by name, laid out as the input. They have gradients: a loss may be made of any of them."""
        return self._run(input, hx, keep=True)

    def _run(self, input, hx, keep):
        x, sizes, undo, to_rows, to_caller = self._as_rows(input)  # x (N, I), rows as in `scan`
        state = self._initial_state(hx, x, sizes[0], to_rows, to_caller)
        ends, traces = [], []
        for k in range(self.num_layers):
            if k > 0 and self.variational:
                mask = F.dropout(x.new_ones(sizes[0], x.shape[-1]), self.dropout, self.training)
                x = x * torch.cat([mask[:n] for n in sizes])  # row by row, as `scan` has them
            elif k > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for d in range(self.directions):
                start = tuple(s[k * self.directions + d] for s in state)  # (B, H) each
                computed, end = self._direction(x, sizes, start, self._layer(k, d), d == 1, keep)
                outputs.append(computed["h"])  # (N, H)
                ends.append(end)
                if keep:
                    traces.append({name: undo(rows) for name, rows in computed.items()})
            x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        # ends has a tuple for each layer and direction; stacked: (layers * directions, B, H).
        state = tuple(torch.stack(s)[:, to_caller] for s in zip(*ends))
        if (self.states == 2 and torch.is_autocast_enabled(x.device.type)
                and x.dtype != torch.float64):
            # The type of torch.nn.LSTM's results (dense, unprojected: the types of others vary).
            low = torch.get_autocast_dtype(x.device.type)
            x, state = x.to(low), tuple(s.to(low) for s in state)
        return undo(x), (state if self.states == 2 else state[0]), traces

    def _direction(self, x, sizes, state, p, reverse, keep):
        """One direction of one layer: x (N, I) -> what `scan` returns. The product with W_ih does
        not need the state, so it is taken out of time: one large product for all steps."""
        gx = F.linear(x, p.weight_ih, p.bias_ih)  # (N, G*H)
        return scan(self.step, gx, sizes, state, p, reverse, keep)

    def _layer(self, k, d):
        """The parameters of layer k in direction d, by their names without suffix."""
        p = dict(bias_ih=None, bias_hh=None, weight_hr=None, nonlinearity=self.nonlinearity)
        for name in self.shapes(1):  # only the names are wanted here
            p[name] = getattr(self, name + self._suffix(k, d))
        return Parameters(**p)

    # The rest of the class (skip): the input's layouts, checks, what else torch.nn's layers have

    def _as_rows(self, input):
        """The input in the one layout that `_run` knows, rows as for `scan`, (N, I); the rows of
        each step; a function that gives rows the input's layout; and two indices into the second
        dimension of a state: s[:, to_rows] takes the sequences from the caller's order to that of
        the rows, s[:, to_caller] back; for a single one they add and drop the dimension."""
        if isinstance(input, PackedSequence):
            self._check_input(input.data)
            to_rows, to_caller = (slice(None) if index is None else index  # None: sorted already
                                  for index in (input.sorted_indices, input.unsorted_indices))
            return (input.data, input.batch_sizes.tolist(),
                    lambda rows: PackedSequence(rows, *input[1:]), to_rows, to_caller)
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, "
                             f"got {input.dim()}D instead")
        self._check_input(input)
        single = input.dim() == 2
        x = input.transpose(0, 1) if self.batch_first and not single else input
        x = x[:, None] if single else x  # (T, B, I)
        T, B = x.shape[:2]
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

        def undo(rows):  # (N, features) -> (T, B, features), or (B, T, ...), or (T, ...)
            y = rows.view(T, B, rows.shape[-1])
            return y[:, 0] if single else y.transpose(0, 1) if self.batch_first else y

        to_rows, to_caller = (None, 0) if single else (slice(None), slice(None))
        return x.reshape(T * B, self.input_size), [B] * T, undo, to_rows, to_caller

    def _check_input(self, x):
        weight = getattr(self, "weight_ih" + self._suffix(0, 0))
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})")
        if x.shape[-1] != self.input_size or x.device != weight.device:
            raise RuntimeError(f"Expected input.size(-1) {self.input_size} on {weight.device}, "
                               f"got {x.shape[-1]} on {x.device}")

    def _initial_state(self, hx, x, B, to_rows, to_caller):
        """hx, checked, or zeros: a tuple of (layers * directions, B, H)."""
        widths = (self.output_size, self.hidden_size)[: self.states]
        zeros = tuple(x.new_zeros(self.num_layers * self.directions, B, width) for width in widths)
        if hx is None:
            return zeros
        state = (hx,) if self.states == 1 else tuple(hx)
        if len(state) != self.states or not all(isinstance(s, torch.Tensor) for s in state):
            raise TypeError(f"{type(self).__name__}: Expected hx to be "
                            f"{('a tensor', 'a tuple (h, c)')[self.states - 1]}, got "
                            f"{type(hx).__name__} of {[type(s).__name__ for s in state]}")
        for k, (s, zero) in enumerate(zip(state, zeros)):
            same_type = s.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
            shape = zero[:, to_caller].shape
            if s.shape != shape or s.device != x.device or not same_type:
                raise RuntimeError(f"Expected hidden[{k}] size {tuple(shape)}, {x.dtype} on "
                                   f"{x.device}, got {list(s.shape)}, {s.dtype} on {s.device}")
        return tuple(s[:, to_rows] for s in state)

    def _check_arguments(self):
        for name in ("input_size", "hidden_size", "bias", "batch_first"):
            kind, value = int if name.endswith("size") else bool, getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name} should be of type {kind.__name__}, "
                                f"got: {type(value).__name__}")
        for name in ("input_size", "hidden_size", "num_layers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than zero, got {getattr(self, name)}")
        dropout, size = self.dropout, self.proj_size
        number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
        if not number or not 0 <= dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
        if size and not (0 < size < self.hidden_size and isinstance(self, LSTM)):
            raise ValueError(f"proj_size must be 0, or in an LSTM below hidden_size, got {size}")
        if dropout and self.num_layers == 1:
            warnings.warn("dropout acts between layers and so needs num_layers greater than 1, "
                          f"but got {dropout=} and num_layers=1", stacklevel=3)

    extra_repr = nn.RNNBase.extra_repr  # shows the sizes, and what is not as by default

    def flatten_parameters(self):
        """Nothing to do: torch.nn's method arranges the weights for cuDNN."""

    @property
    def all_weights(self):
        """The parameters of each direction of each layer, as in torch.nn: a list of lists."""
        return [[getattr(self, name + self._suffix(k, d)) for name in self.shapes(1)]
                for k in range(self.num_layers) for d in range(self.directions)]


class RNN(RNNBase):
    step = staticmethod(rnn_step)

    def __init__(self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", *args, **kwargs):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, num_layers, *args, **kwargs)  # as in RNNBase


class LSTM(RNNBase):
    step, gates, states = staticmethod(lstm_step), 4, 2

    def _direction(self, x, sizes, state, p, reverse, keep):
        """(skip) As above, or fused (see below): csrc/ has this cell, without P, and returns h."""
        only_plain = keep or self.proj_size or self.step is not lstm_step
        if FUSED == "1" and not fused and not only_plain:
            raise RuntimeError("RNN_FUSED=1, but the fused LSTM is not built: run python setup.py "
                               "develop, or call rnn.build()")
        if only_plain or not (fused and fused.can_run(x) and fused.pays_off(x, sizes)):
            return super()._direction(x, sizes, state, p, reverse, keep)
        bias = p.bias_ih + p.bias_hh if self.bias else p.weight_hh.new_zeros(len(p.weight_hh))
        inputs = (x, *state, p.weight_ih, bias, p.weight_hh)
        h, end = fused.lstm(*inputs, sizes, reverse, plain_lstm)  # plain: for second derivatives
        return {"h": h}, end


class GRU(RNNBase):
    step, gates = staticmethod(gru_step), 3


class OriginalGRU(GRU):
    step = staticmethod(original_gru_step)


def map_state(function, *states):
    """Apply a function to a state, whether a tensor (RNN, GRU) or a tuple of two (LSTM)."""
    if isinstance(states[0], torch.Tensor):
        return function(*states)
    return tuple(function(*parts) for parts in zip(*states))


@torch.no_grad()
def initialize(module):
    """Initial values for training, in place of torch's uniform ones, in every recurrent and every
    Linear layer of `module`: recurrent weights orthogonal, which neither shrink nor stretch a
    state, all others Xavier, which keeps the size of signals; each gate's block on its own. Biases
    0, but 1 for the forget gate: an LSTM begins with f at 0.73, not 0.5. torch has two biases that
    are added, so only b_ih gets the 1: setting both would make it 2."""
    for layer in module.modules():
        if not isinstance(layer, (RNNBase, nn.Linear)):
            continue
        for name, value in layer.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(value)
            elif name.startswith("weight_hh"):
                for block in value.chunk(layer.gates):  # (H, H or P) each
                    nn.init.orthogonal_(block)
            elif name.startswith("weight_ih"):
                for block in value.chunk(layer.gates):  # (H, I) each
                    nn.init.xavier_uniform_(block)
            elif name.startswith("weight") and value.dim() == 2:  # W_hr; a Linear's
                nn.init.xavier_uniform_(value)
            if name.startswith("bias_ih") and isinstance(layer, LSTM):
                nn.init.ones_(value.chunk(4)[1])  # i, f, g, o
    return module


# ----------------------------------------------------------------------------------------------
# The fused LSTM, optional (skip): csrc/ has an LSTM's walk over time as one operator in native
# code, which is faster; `LSTM._direction` takes it where it is built and the input suits it.
# RNN_FUSED in the environment, 0: never; 1: an LSTM that could take it fails if it is not built.


def plain_lstm(x, h0, c0, w_ih, bias, w_hh, sizes, reverse):
    """h and c (N, H) after every row's step, from x (N, I): one direction of one layer."""
    p = Parameters(weight_hh=w_hh, bias_hh=None, weight_hr=None)
    computed, _ = scan(lstm_step, F.linear(x, w_ih, bias), sizes, (h0, c0), p, reverse, keep=True)
    return computed["h"], computed["c"]


FUSED = os.environ.get("RNN_FUSED", "")
if FUSED not in ("", "0", "1"):
    raise ValueError(f"RNN_FUSED must be 0, 1 or unset, got '{FUSED}'")
fused = None  # csrc/__init__.py as a module, once it is loaded
if FUSED != "0":
    with contextlib.suppress(ModuleNotFoundError):  # only setup.py makes this module
        import rnn_C

        fused = rnn_C.load()  # None, and a warning, if it does not fit this Python, torch or CPU


def build():
    """Compile csrc/, unless that has been done, and let LSTMs use it from now on. Takes a C++
    compiler, ninja and half a minute; torch keeps the result. Raises RuntimeError if it fails."""
    global fused
    if fused:
        return
    if FUSED == "0":
        raise RuntimeError("RNN_FUSED=0 in the environment forbids the fused LSTM")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc", "__init__.py")
    try:
        # Under the name that setup.py gives it: whoever asks for rnn_C gets this one.
        spec = importlib.util.spec_from_file_location("rnn_C", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.compile_and_load()
        sys.modules["rnn_C"] = module  # where torch.compile looks its functions up
    except Exception as error:  # no compiler, no ninja, no csrc/, an error of the compiler
        raise RuntimeError(f"the fused LSTM could not be built: {error}") from error
    fused = module


# ----------------------------------------------------------------------------------------------
# Cell modules: drop-ins for torch.nn.RNNCell, LSTMCell, GRUCell (skip)


class CellBase:
    """torch.nn's cell modules: a layer that runs for one step, and whose parameters' names have no
    suffix. Stands before RNN, LSTM or GRU in a class's bases, where `super()` here finds them.
    input (B, I) or (I,); hx (B, H) or (H,), for LSTM a tuple (h, c), absent means zeros. Returns
    the new state. Errors are mostly the layers', in whose shapes a 1 stands first: of one layer."""

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None):
        super().__init__(input_size, hidden_size, bias=bool(bias), device=device, dtype=dtype)

    def _suffix(self, k, d):
        return ""

    def _run(self, input, hx, keep):
        state = () if hx is None else (hx,) if isinstance(hx, torch.Tensor) else hx
        for value in (input, *state):
            if value.dim() not in (1, 2):
                raise ValueError(f"{type(self).__name__}: Expected input and hx to be 1D or 2D, "
                                 f"got {value.dim()}D instead")
        hx = None if hx is None else map_state(lambda s: s[None], hx)  # (1, B, H): of one layer
        output, state, traces = super()._run(input[None], hx, keep)  # (1, B, I): one step
        traces = [{name: rows[0] for name, rows in computed.items()} for computed in traces]
        return output[0], map_state(lambda s: s[0], state), traces

    def forward(self, input, hx=None):
        return self._run(input, hx, keep=False)[1]

    extra_repr = nn.RNNCellBase.extra_repr


class RNNCell(CellBase, RNN):
    def __init__(self, input_size, hidden_size, bias=True, nonlinearity="tanh", device=None,
                 dtype=None):
        RNN.__init__(self, input_size, hidden_size, nonlinearity=nonlinearity, bias=bool(bias),
                     device=device, dtype=dtype)


class LSTMCell(CellBase, LSTM):
    pass


class GRUCell(CellBase, GRU):
    pass


# ----------------------------------------------------------------------------------------------
# Models


CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU, "original_gru": OriginalGRU}  # and your own
# Padding, and what stands at the beginning and end of a target sequence: the first symbols of a
# vocabulary made with specials=SPECIALS (see Vocab).
SPECIALS = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)


def pack(x, lengths):
    """x (B, T, features), lengths (B,) -> PackedSequence, in any order of lengths."""
    lengths = torch.as_tensor(lengths).cpu()
    if lengths.shape != x.shape[:1] or lengths.min() < 1 or lengths.max() > x.shape[1]:
        raise ValueError(f"lengths should be {len(x)} numbers from 1 to {x.shape[1]}, "
                         f"got {lengths.tolist()}")
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


@contextlib.contextmanager
def evaluating(model):
    """Dropout off and no gradients, until the end of the block, however it ends."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Model(nn.Module):
    """What the models share: an embedding, or one-hot vectors, and layers that read them; each has
    an `output`, too. config: its constructor's arguments, so that `load` can make it again."""

    def __init__(self, config, padding_idx=None):
        super().__init__()
        # config comes as the constructor's locals(): with self and, due to super(), __class__.
        self.config = {k: v for k, v in config.items() if k not in ("self", "__class__")}
        self.vocab_size, one_hot = config["vocab_size"], config.get("one_hot")
        self.reads = self.vocab_size if one_hot else config["embed"]  # I of the first layer
        self.embedding = None if one_hot else nn.Embedding(self.vocab_size, self.reads, padding_idx)

    def make_layers(self, hidden, **options):
        cell, layers = self.config["cell"], self.config["layers"]
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got '{cell}'")
        dropout = self.config["dropout"] if layers > 1 else 0.0  # it acts between layers
        return CELLS[cell](self.reads, hidden, layers, dropout=dropout, **options)

    def embed(self, ids):  # (...) -> (..., I)
        if self.embedding is None:
            return F.one_hot(ids, self.vocab_size).to(self.output.weight.dtype)
        return self.embedding(ids)


class CharLM(Model):
    """Language model, T symbols in, T predictions out: embedding, layers, output.

    cell: a name in CELLS. dropout: on the embedding (embed_dropout there, if given), between layers
    and on what the output layer reads, never on the recurrence; variational: by one mask for all
    steps of a call (as in Gal & Ghahramani 2016, who also drop the recurrence). tie: one matrix
    serves as embedding and as output weights, so embed must equal hidden. one_hot: no embedding,
    the layer reads one-hot vectors (embed is not used).
    Raises ValueError for values that do not fit."""

    def __init__(self, vocab_size, embed=64, hidden=256, layers=1, cell="lstm", dropout=0.0,
                 embed_dropout=None, tie=False, one_hot=False, variational=False):
        super().__init__(locals())
        if tie and (one_hot or embed != hidden):
            raise ValueError("tie=True makes the embedding the output weights: it needs embed == "
                             f"hidden and one_hot=False, got {embed=}, {hidden=}, {one_hot=}")
        self.rnn = self.make_layers(hidden)
        self.rnn.variational = variational
        self.embed_dropout = nn.Dropout(dropout if embed_dropout is None else embed_dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, vocab_size)
        if tie:
            self.embedding.weight = self.output.weight  # whose initial values suit the logits

    def drop(self, x, dropout):  # (T, B, features)
        if self.rnn.variational:
            return x * dropout(torch.ones_like(x[:1]))  # (1, B, features): a mask for all T
        return dropout(x)

    def forward(self, ids, state=None):
        """ids (B, T) -> logits (B, T, V) and the state after them, as the layer's."""
        if ids.dim() != 2:
            raise ValueError(f"CharLM: Expected ids to be 2D, (B, T), got {ids.dim()}D instead")
        x = self.drop(self.embed(ids.t()), self.embed_dropout)  # (T, B, I): the order of `scan`
        x, state = self.rnn(x, state)  # (T, B, H)
        return self.output(self.drop(x, self.dropout)).transpose(0, 1), state  # (B, T, V)

    def stepper(self, state):
        """(skip) A function that reads one more symbol of each sequence, from this state on: ids
        (B,) -> logits (B, V). They are forward's without dropout, but quicker: what stays the same
        from step to step is looked up here, once."""
        rnn, weight, bias = self.rnn, self.output.weight, self.output.bias
        table = None if self.embedding is None else self.embedding.weight  # (V, I)
        layers = [rnn._layer(k, 0) for k in range(rnn.num_layers)]
        states = list(zip(*state)) if rnn.states == 2 else [(h,) for h in state]  # for each layer

        def read_one(ids):
            x = self.embed(ids) if table is None else table[ids]  # (B, I)
            for k, p in enumerate(layers):
                computed, states[k] = rnn._direction(x, [len(x)], states[k], p, False, False)
                x = computed["h"]  # (B, H)
            return F.linear(x, weight, bias)

        return read_one

    def init_state(self, batch):
        """The state before the first symbol, zeros: (layers, B, H), for LSTM a tuple of two."""
        zeros = self.output.weight.new_zeros(self.rnn.num_layers, batch, self.rnn.hidden_size)
        return (zeros, zeros.clone()) if self.rnn.states == 2 else zeros


class Classifier(Model):
    """Many to one: classifies a sequence. Embedding, layers, and an output that reads the hidden
    state in which each direction of the last layer ends. Two classes have two logits, too: their
    difference is what a single logit would be. Arguments that CharLM has mean the same; index 0 is
    padding, as in a vocabulary with SPECIALS: the embedding of a symbol there is never learnt."""

    def __init__(self, vocab_size, classes=2, embed=64, hidden=128, layers=1, cell="lstm",
                 dropout=0.0, bidirectional=False, one_hot=False):
        super().__init__(locals(), padding_idx=PAD)
        self.rnn = self.make_layers(hidden, batch_first=True, bidirectional=bidirectional)
        self.drop = nn.Dropout(dropout)
        self.output = nn.Linear(hidden * self.rnn.directions, classes)

    def forward(self, ids, lengths=None):
        """ids (B, T), padded as by `pad`, and their lengths (B,), None for all T -> logits
        (B, classes). Padding is not read. Raises ValueError for lengths not from 1 to T."""
        x = self.drop(self.embed(ids))  # (B, T, I)
        _, state = self.rnn(x if lengths is None else pack(x, lengths))
        h = state[0] if self.rnn.states == 2 else state  # (layers * directions, B, H)
        last = torch.cat(tuple(h[-self.rnn.directions :]), dim=-1)  # (B, directions * H)
        return self.output(self.drop(last))


class Seq2Seq(Model):
    """Many to many: one sequence becomes another. An encoder reads the source in both directions; a
    decoder, which starts from the encoder's last states, predicts the target symbol by symbol. At
    each step attention (Luong et al. 2015) looks where in the source to read: q the decoder's
    hidden state, m_t the encoder's at source step t, both H wide,

        weights = softmax over t of (W q) . m_t     h~ = tanh(W_mix [q, sum of weights * m_t] + b)

    and the output reads h~. Source and target share one vocabulary, which begins with SPECIALS.
    Each direction of the encoder is H / 2 wide. Raises ValueError for values that do not fit."""

    def __init__(self, vocab_size, embed=64, hidden=128, layers=1, cell="lstm", dropout=0.0):
        super().__init__(locals(), padding_idx=PAD)
        if hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction, got {hidden}")
        self.encoder = self.make_layers(hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = self.make_layers(hidden, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, vocab_size)

    def encode(self, source, lengths):
        """source (B, T), lengths (B,) -> memory (B, T, H), where it is valid (B, T), and the state
        that the decoder starts from."""
        memory, state = self.encoder(pack(self.drop(self.embed(source)), lengths))
        T = source.shape[1]
        memory, lengths = pad_packed_sequence(memory, batch_first=True, total_length=T)
        valid = torch.arange(T) < lengths[:, None]  # (B, T)
        # Both directions of a layer side by side: (layers * 2, B, H / 2) -> (layers, B, H).
        state = map_state(lambda s: torch.cat((s[0::2], s[1::2]), dim=-1), state)
        return memory, valid.to(source.device), state

    def decode(self, ids, memory, valid, state):
        """The next M symbols, ids (B, M) -> logits (B, M, V), weights (B, M, T), state."""
        q, state = self.decoder(self.drop(self.embed(ids)), state)  # (B, M, H)
        scores = self.query(q) @ memory.transpose(1, 2)  # (B, M, T)
        weights = scores.masked_fill(~valid[:, None], -math.inf).softmax(dim=-1)
        h = self.mix(torch.cat((q, weights @ memory), dim=-1)).tanh()  # (B, M, H)
        return self.output(self.drop(h)), weights, state

    def forward(self, source, lengths, target):
        """Teacher forcing: target (B, M), from BOS on, is what the decoder reads, whatever it
        predicts. Returns logits (B, M, V), each of the symbol after, and weights (B, M, T)."""
        return self.decode(target, *self.encode(source, lengths))[:2]

    def translate(self, source, lengths, beam=1, length=100):
        """(skip) The decoder reads its own output, to EOS or for `length` symbols. beam: how many
        targets, the likeliest so far, are kept at every step; 1 is greedy. Returns the best target
        of each source: ids (B, M), all EOS after its end; ln of its probability (B,); weights
        (B, M, T). Raises ValueError for a beam or length below 1."""
        if beam < 1 or length < 1:
            raise ValueError(f"beam and length must be at least 1, got {beam} and {length}")
        with evaluating(self):
            memory, valid, state = self.encode(source, lengths)
            B, T, V = *source.shape, self.vocab_size
            # `beam` rows for every source, one below the other. They begin alike, and would all
            # choose alike: so at first only one of them has a chance.
            memory, valid = (m.repeat_interleave(beam, dim=0) for m in (memory, valid))
            state = map_state(lambda s: s.repeat_interleave(beam, dim=1), state)
            ids = source.new_full((B * beam, 1), BOS)
            weights = memory.new_empty(B * beam, 0, T)
            total = memory.new_full((B, beam), -math.inf)
            total[:, 0] = 0.0
            for _ in range(length):
                logits, looks, state = self.decode(ids[:, -1:], memory, valid, state)
                logp = logits[:, -1].log_softmax(dim=-1)  # (B * beam, V)
                ended = ids[:, -1] == EOS  # these go on with EOS for certain, and stay as they are
                logp[ended] = -math.inf
                logp[ended, EOS] = 0.0
                total = (total[..., None] + logp.view(B, beam, V)).flatten(1)  # (B, beam * V)
                total, best = total.topk(beam)  # (B, beam) each; best: row * V + symbol
                first = torch.arange(B, device=best.device)[:, None] * beam  # each source's row 0
                rows = (first + best // V).flatten()  # those that go on, (B * beam,)
                ids = torch.cat((ids[rows], (best % V).view(-1, 1)), dim=1)
                weights = torch.cat((weights[rows], looks[rows]), dim=1)
                state = map_state(lambda s: s[:, rows], state)
                if (ids[::beam, -1] == EOS).all():  # every best one has ended; totals only fall
                    break
        return ids[::beam, 1:], total[:, 0], weights[::beam]


# ----------------------------------------------------------------------------------------------
# Text: symbols, and batches of them


class Vocab:
    """Symbols <-> indices. `Vocab.of(text)` has a text's characters, sorted; with words=True its
    words, marks and spaces, the most frequent first. Either way decode(encode(text)) == text, but
    with "<unk>" among the symbols all that is unknown becomes "<unk>". Without that, encode raises
    ValueError naming what is unknown."""

    def __init__(self, symbols, words=False):
        self.symbols, self.words = list(symbols), words
        self.index = {symbol: k for k, symbol in enumerate(self.symbols)}
        if len(self.index) < len(self.symbols):
            raise ValueError("a vocabulary cannot hold the same symbol twice")

    @classmethod
    def of(cls, text, words=False, max_size=None, specials=()):
        """max_size: of the whole vocabulary: keep the most frequent symbols only, with "<unk>" for
        all others (added to the specials if need be). specials: symbols such as "<pad>" that come
        first, from 0 on."""
        if not text:
            raise ValueError("cannot make a vocabulary of an empty text")
        if isinstance(specials, str):
            raise TypeError(f"specials should be a list of symbols, got the str {specials!r}")
        counts, specials = Counter(cls._split(text, words)), list(specials)
        if max_size is not None and max_size < len(counts) + len(specials):
            specials += [] if "<unk>" in specials else ["<unk>"]
            if max_size <= len(specials):
                raise ValueError(f"max_size={max_size} leaves no room beside {specials}")
        kept = counts.most_common(None if max_size is None else max_size - len(specials))
        symbols = [symbol for symbol, count in kept]
        return cls(specials + (symbols if words else sorted(symbols)), words)

    @staticmethod
    def _split(text, words):
        # A single space goes with the word, or the run of marks, after it; other white space alone.
        return re.findall(r" ?\w+(?:'\w+)*| ?[^\w\s]+|\s+", text) if words else text

    def __len__(self):
        return len(self.symbols)

    def encode(self, text):
        """str -> LongTensor (L,)."""
        symbols, unknown = self._split(text, self.words), self.index.get("<unk>")
        missing = sorted(set(symbols) - self.index.keys()) if unknown is None else []
        if missing:
            shown = ", ".join(map(repr, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise ValueError(f"{len(missing)} symbols are not in the vocabulary: {shown}")
        return torch.tensor([self.index.get(s, unknown) for s in symbols], dtype=torch.long)

    def decode(self, ids):
        """Indices -> str."""
        return "".join(self.symbols[k] for k in torch.as_tensor(ids).tolist())


def pad(sequences, value=PAD):
    """Sequences of ids, of any lengths -> ids (B, T) with `value` after each end, lengths (B,)."""
    sequences = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value), lengths


def buckets(lengths, batch):
    """An epoch in batches of similar length, so that little is padded: a list of indices (B,). The
    order of the batches is random, and that of equally long sequences."""
    lengths, order = torch.as_tensor(lengths), torch.randperm(len(lengths))
    chunks = order[lengths[order].argsort(stable=True)].split(batch)
    return [chunks[k] for k in torch.randperm(len(chunks))]


class Batches:
    """Endless chunks of a text, ids (L,), which already sit on the device.

    order="sequential": row b begins at symbol b * (L // batch), and every batch reads on where the
    last one ended, so that the state can be carried over; after the text's end comes its beginning.
    order="random": windows from anywhere, each to be read from a state of zeros.
    `next()` returns x, y (B, T): y holds the symbol that follows each symbol of x.
    """

    def __init__(self, ids, batch, context, order="sequential", seed=0):
        if batch < 1 or context < 1:
            raise ValueError(f"batch and context must be at least 1, got {batch} and {context}")
        if ids.dim() != 1 or ids.dtype != torch.long:
            raise ValueError(f"ids should be (L,) of torch.int64, got {tuple(ids.shape)} of "
                             f"{ids.dtype}")
        if order not in ("sequential", "random"):
            raise ValueError(f"order must be 'sequential' or 'random', got '{order}'")
        needed = (batch if order == "sequential" else 1) * context + 1
        if len(ids) < needed:
            raise ValueError(f"a text of {len(ids)} symbols is too short: {batch=}, {context=} in "
                             f"{order} order need {needed}; give more, or make those smaller")
        self.ids, self.batch, self.context = ids, batch, context
        self.carries_state = order == "sequential"
        self.position = 0  # how far every row has read, in symbols
        self.random = torch.Generator().manual_seed(seed)

    def next(self):
        L = len(self.ids)
        if self.carries_state:
            first = torch.arange(self.batch) * (L // self.batch) + self.position  # (B,)
            self.position = (self.position + self.context) % L
        else:
            first = torch.randint(L - self.context, (self.batch,), generator=self.random)  # (B,)
        where = (first[:, None] + torch.arange(self.context + 1)) % L  # (B, T + 1)
        chunk = self.ids[where.to(self.ids.device)]
        return chunk[:, :-1], chunk[:, 1:]


# ----------------------------------------------------------------------------------------------
# Evaluation


def cross_entropy(logits, targets, reduction="mean"):
    """Nats per symbol, over all positions, or their "sum": logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def accuracy(logits, targets):
    """The fraction of targets (...) that have the largest of the logits (..., classes)."""
    return (logits.argmax(dim=-1) == targets).double().mean().item()


def evaluate(model, ids, batch=64, context=256):
    """(skip) The exact loss on a text, ids (L,), in nats per symbol: the state is carried from the
    first symbol to the last, and all L - 1 predictions count alike. Raises ValueError if L < 2, and
    for batch or context below 1.

    To be quick, `batch` pieces of the text are read side by side. Each should start from the state
    in which the piece before it ends, which is not known yet: so all start from zeros, then once
    more from the ends just found, and so on until those stay the same. The end of a piece depends
    little on how it began, so a few passes will do; more than `batch` never change anything.
    float32's rounding aside, batch changes the result by less than a millionth."""
    predictions = len(ids) - 1
    if predictions < 1 or batch < 1 or context < 1:
        raise ValueError("evaluation needs a text of at least 2 symbols, batch and context of at "
                         f"least 1; got {len(ids)}, {batch} and {context}")
    length = math.ceil(predictions / batch)
    batch = math.ceil(predictions / length)  # so that no piece is empty
    missing = batch * length - predictions  # at the end of the last piece
    x = F.pad(ids[:-1], (0, missing)).view(batch, length)  # (B, length)
    y = F.pad(ids[1:], (0, missing), value=-100).view(batch, length)  # -100: costs nothing
    with evaluating(model):
        start = zeros = model.init_state(batch)
        for _ in range(batch):
            total, end = 0.0, start
            for xk, yk in zip(x.split(context, dim=1), y.split(context, dim=1)):
                logits, end = model(xk, end)
                total += float(cross_entropy(logits, yk, reduction="sum"))
            # Anew: the first piece starts from zeros, each other where the one before has ended.
            before, start = start, map_state(lambda z, s: torch.cat((z[:, :1], s[:, :-1]), 1),
                                             zeros, end)
            pairs = [(start, before)] if isinstance(start, torch.Tensor) else zip(start, before)
            if all((s - t).abs().max() <= 1e-5 * t.abs().max() for s, t in pairs):  # as they were
                break
    return total / predictions


def perplexity(model, ids, batch=64):
    """exp(loss): the model is as uncertain as one that has to choose from so many symbols, all
    equally likely. As exact as `evaluate`."""
    return math.exp(evaluate(model, ids, batch))


# ----------------------------------------------------------------------------------------------
# Sampling


def generate(model, vocab, prompt="", length=500, temperature=1.0, top_k=None, seed=None,
             stream=None):
    """Continue the prompt by `length` symbols and return both as one str.

    The prompt warms the state up; an empty one stands for a new line, or symbol 0. temperature:
    logits are divided by it; 0 always takes the likeliest symbol. top_k: draw from the k likeliest.
    stream: a file, such as sys.stdout, that gets every symbol as soon as it is drawn.
    Raises ValueError for bad values and for symbols of the prompt that the vocabulary lacks."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, and finite, got {temperature}")
    if length < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"length must be 0 or more, top_k at least 1, got {length} and {top_k}")
    device = model.output.weight.device
    random = torch.Generator()  # on the CPU: the same draw on every device
    random.seed() if seed is None else random.manual_seed(seed)
    ids = vocab.encode(prompt) if prompt else torch.tensor([vocab.index.get("\n", 0)])
    pieces = [prompt]
    with evaluating(model), torch.inference_mode():
        logits, state = model(ids[None].to(device))  # (1, T, V)
        logits, step = logits[:, -1], model.stepper(state)  # (1, V)
        if stream:
            stream.write(prompt)
        for _ in range(length):
            scores = logits.cpu().double()  # (1, V)
            if top_k and top_k < scores.shape[-1]:
                least = scores.topk(top_k).values[:, -1:]
                scores = scores.masked_fill(scores < least, -math.inf)
            if temperature == 0:
                symbol = scores.argmax(-1)  # (1,)
            else:
                chances = (scores / max(temperature, 1e-100)).softmax(-1)  # never infinity
                # torch.multinomial's draw without its checks, for speed: for exponential random
                # numbers, the largest of chance / number is symbol k's with probability chance k.
                waits = torch.empty_like(chances).exponential_(generator=random)
                symbol = (chances / waits).argmax(-1)  # (1,)
            pieces.append(vocab.symbols[symbol])
            if stream:
                stream.write(pieces[-1])
                stream.flush()
            logits = step(symbol.to(device))  # (1, V)
    return "".join(pieces)


# ----------------------------------------------------------------------------------------------
# Checkpoints (skip)

MODELS = {model.__name__: model for model in (CharLM, Classifier, Seq2Seq)}


def save(path, model, vocab, **training):
    """Write a checkpoint: one file with the model's kind, config and weights, the vocabulary, and
    whatever training needs to go on. It appears whole or not at all: a file of another name is
    written to the end, then renamed, so an earlier checkpoint survives any interruption.
    Raises OSError naming the path when it cannot be written."""
    content = {"format": "rnn.py 2", "kind": type(model).__name__, "config": model.config,
               "weights": model.state_dict(), "symbols": vocab.symbols, "words": vocab.words,
               "training": training}
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def load(path, device="cpu"):
    """Read a checkpoint: the model, on any device, vocabulary, and the dict of training's values.
    Nothing in the file is run. Raises FileNotFoundError, or ValueError if it is damaged, be it by
    a single bit, or not a checkpoint of this library."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load compares no checksums, and does not read a part that is marked as a folder.
            if archive.testzip() or any(p.external_attr & 0x10 for p in archive.infolist()):
                raise ValueError("a part of it is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != "rnn.py 2":
            raise ValueError(f"its format is {content['format']!r}, expected 'rnn.py 2'")
        kind, config, weights = MODELS[content["kind"]], content["config"], content["weights"]
        if config.get("layers", 0) > len(weights):  # a billion of them would take for ever
            raise ValueError(f"weights of {len(weights)} tensors for {config['layers']} layers")
        with torch.device("meta"):  # whatever the sizes, this takes no memory: they must fit first
            kind(**config).load_state_dict(dict(weights), assign=True)  # copied, for it is marked
        with torch.random.fork_rng(devices=[]):  # initial values are drawn, but not wanted
            model = kind(**config)
        for name, value in model.state_dict(keep_vars=True).items():
            value.data = value.data.to(weights[name].dtype)
        model.load_state_dict(weights)
        vocab, training = Vocab(content["symbols"], content["words"]), content["training"]
        if len(vocab) != model.vocab_size or not all(isinstance(s, str) for s in vocab.symbols):
            raise ValueError(f"{len(vocab)} symbols, expected {model.vocab_size}, of type str")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # torch.load raises many kinds for damaged files
        raise ValueError(f"{path} is damaged or not a checkpoint of rnn.py: {error}") from error
    return model.to(device), vocab, training


# ----------------------------------------------------------------------------------------------
# Training. What surrounds it in a long run is in train_shakespeare.py: reports, the best
# checkpoint, early stopping, going on after an interruption, several processes.


def backpropagate(model, x, y, state, accumulate, autocast):
    """Add the gradient of the mean loss on one batch, x and y (B, T), to the parameters; with
    accumulate above 1 in up to as many parts, some of the rows each, to save memory. Returns the
    loss and the state after the batch, detached: its values live on, its graph ends here. That
    truncates backpropagation through time (BPTT): else the next batch's would go on into this one's
    graph, which is freed by then (RuntimeError) or, if kept, grows with every batch."""
    loss, ends = 0.0, []
    for k, (xk, yk) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate))):
        start = map_state(lambda s: s.chunk(accumulate, dim=1)[k], state)  # (layers, part of B, H)
        with autocast:
            logits, end = model(xk, start)
        part = cross_entropy(logits, yk) * (len(xk) / len(x))
        part.backward()
        loss += part.detach()
        ends.append(map_state(torch.Tensor.detach, end))
    return loss, map_state(lambda *s: torch.cat(s, dim=1), *ends)


def learning_rate(lr, warmup, step, done):
    """The rate of a step: lr times a rise over the first `warmup` steps, times half a cosine that
    falls from 1 to 3 %. done: the part of the run that is over, from 0 to 1."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return lr * rise * (0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """A CharLM in training by truncated BPTT: its optimizer, AdamW; `state`, which in sequential
    order every batch takes over from the one before; `steps` taken.

    weight_decay  of matrices; vectors, such as biases, do not decay
    clip          largest norm of the gradient, which over many steps may explode; math.inf: none
    accumulate    compute the gradient of a batch in this many parts
    dtype         torch.bfloat16 runs the model under autocast
    seed          torch's global random numbers follow from it and from the step's number, so that
                  a run that was interrupted drops the same units as one that was not
    Raises ValueError for values that do not fit, TypeError for another model."""

    def __init__(self, model, batches, *, weight_decay=0.01, clip=1.0, accumulate=1,
                 dtype=torch.float32, seed=0):
        if accumulate < 1 or not clip > 0 or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError("accumulate must be at least 1, clip above 0, dtype torch.float32 or "
                             f"torch.bfloat16; got {accumulate=}, {clip=}, {dtype=}")
        if not hasattr(model, "init_state"):
            raise TypeError(f"truncated BPTT needs a CharLM, got {type(model).__name__}")
        least, most = int(batches.ids.min()), int(batches.ids.max())
        if least < 0 or most >= model.vocab_size:
            raise ValueError(f"a model of {model.vocab_size} symbols cannot read ids from {least} "
                             f"to {most}")
        self.model, self.batches, self.clip, self.accumulate = model, batches, clip, accumulate
        self.replica = model  # what reads the batches: DistributedDataParallel may stand here
        self.seed, self.steps, self.state = seed, 0, model.init_state(batches.batch)
        self.autocast = torch.autocast(batches.ids.device.type, dtype,
                                       enabled=dtype != torch.float32)
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1]},
                  {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay,
                                           fused=True)  # torch's own fused update

    def step(self, lr):
        """Learn from one batch, at this rate. Returns the loss in nats per symbol and the norm of
        its gradient before clipping, as tensors: a GPU need not be waited for."""
        self.model.train()
        torch.manual_seed(self.seed + 1000 * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = self.batches.next()  # (B, T) each
        if not self.batches.carries_state:
            self.state = self.model.init_state(len(x))
        self.optimizer.zero_grad()
        loss, self.state = backpropagate(self.replica, x, y, self.state, self.accumulate,
                                         self.autocast)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.steps += 1
        return loss, norm


def train(model, batches, steps, lr=4e-3, warmup=20, **options):
    """Train a CharLM; options are Trainer's. A generator: after every step it hands out the step's
    number, from 1 on, the loss and the gradient's norm. What to do in between is up to you:

        for step, loss, norm in rnn.train(model, rnn.Batches(ids, batch=32, context=64), 1000):
            if step % 100 == 0:
                print(step, loss, rnn.evaluate(model, held_out))
                rnn.save("model.pt", model, vocab)

    A second call begins anew but for model and batches. Raises, as it begins, Trainer's errors and
    ValueError for bad values; FloatingPointError after a step whose loss or norm is not finite."""
    if not (steps >= 1 and warmup >= 0 and 0 <= lr < math.inf):
        raise ValueError("steps must be at least 1, warmup at least 0, lr at least 0 and finite; "
                         f"got {steps=}, {warmup=}, {lr=}")
    trainer = Trainer(model, batches, **options)
    for step in range(steps):
        loss, norm = map(float, trainer.step(learning_rate(lr, warmup, step, step / steps)))
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"training stopped at step {step + 1}: {loss=}, gradient "
                                     f"{norm=}. A smaller lr or clip may help")
        yield step + 1, loss, norm
