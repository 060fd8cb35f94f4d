"""Cells of your own: Cho's original GRU, the peephole LSTM, the LSTM with layer normalization, and
the LSTM written with one product per gate.

    python tests/examples/cells.py

trains each of them for about a second on lines such as aaabbb, where a network has to count, and
prints its bits per character on held-out lines.

A cell is a function of one step, and a class that names it. The class then has every option of the
layers: stacked, in both directions, projected, packed, traced. A cell with further parameters
names them in `extra`, with their lengths in units of H. In a character model a cell goes by a name
in rnn.CELLS.
"""

import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of rnn.py
import rnn


def original_gru_step(gx, state, p):
    """Cho et al. 2014: the reset gate acts on h, before the product with W_hn."""
    (h,) = state  # (B, H)
    H = h.shape[-1]
    if p.bias_hh is not None:
        gx = gx + p.bias_hh  # in this form the two biases only appear as their sum
    a = gx[:, : 2 * H] + F.linear(h, p.weight_hh[: 2 * H])  # (B, 2H)
    r, z = a.sigmoid().chunk(2, dim=-1)  # 2 x (B, H)
    n = (gx[:, 2 * H :] + F.linear(r * h, p.weight_hh[2 * H :])).tanh()  # (B, H)
    return {"h": (1 - z) * n + z * h, "r": r, "z": z, "n": n}


class OriginalGRU(rnn.GRU):
    step = staticmethod(original_gru_step)


def peephole_step(gx, state, p):
    """Gers & Schmidhuber 2000: the gates also see the cell state, each unit its own."""
    h, c = state  # (B, H) each
    i, f, g, o = (gx + F.linear(h, p.weight_hh, p.bias_hh)).chunk(4, dim=-1)  # 4 x (B, H)
    see_i, see_f, see_o = p.weight_peep.chunk(3)  # (H,) each
    i, f, g = (i + see_i * c).sigmoid(), (f + see_f * c).sigmoid(), g.tanh()
    c = f * c + i * g
    o = (o + see_o * c).sigmoid()  # sees the new one
    return {"h": rnn.project(o * c.tanh(), p), "c": c, "i": i, "f": f, "g": g, "o": o}


class PeepholeLSTM(rnn.LSTM):
    step = staticmethod(peephole_step)
    extra = {"weight_peep": 3}


def layer_norm_lstm_step(gx, state, p):
    """Ba et al. 2016: both products are normalized before the biases are added; so is c' on its
    way to h', but not on its way to the next step."""
    h, c = state  # (B, H) each
    b_ih, b_hh = (0, 0) if p.bias_ih is None else (p.bias_ih, p.bias_hh)
    # gx is W_ih x + b_ih, but only W_ih x is normalized: take b_ih out, add it afterwards.
    a = F.layer_norm(gx - b_ih, gx.shape[-1:], p.norm_ih) + b_ih + b_hh
    a = a + F.layer_norm(F.linear(h, p.weight_hh), gx.shape[-1:], p.norm_hh)  # (B, 4H)
    i, f, g, o = a.chunk(4, dim=-1)  # 4 x (B, H)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    h = o * F.layer_norm(c, c.shape[-1:], p.norm_c, p.bias_c).tanh()
    return {"h": rnn.project(h, p), "c": c, "i": i, "f": f, "g": g, "o": o}


class LayerNormLSTM(rnn.LSTM):
    step = staticmethod(layer_norm_lstm_step)
    extra = {"norm_ih": 4, "norm_hh": 4, "norm_c": 1, "bias_c": 1}

    def reset_parameters(self):
        super().reset_parameters()
        for name, value in self.named_parameters():
            if name.startswith("norm"):
                nn.init.ones_(value)


def clear_lstm_step(gx, state, p):
    """An LSTM as it is written on paper: for each gate its own matrix and its own product."""
    h, c = state  # (B, H) each
    (xi, xf, xg, xo), (wi, wf, wg, wo) = gx.chunk(4, -1), p.weight_hh.chunk(4)
    bi, bf, bg, bo = (0,) * 4 if p.bias_hh is None else p.bias_hh.chunk(4)
    i = torch.sigmoid(xi + h @ wi.T + bi)
    f = torch.sigmoid(xf + h @ wf.T + bf)
    g = torch.tanh(xg + h @ wg.T + bg)
    o = torch.sigmoid(xo + h @ wo.T + bo)
    c = f * c + i * g
    return {"h": rnn.project(o * torch.tanh(c), p), "c": c, "i": i, "f": f, "g": g, "o": o}


class ClearLSTM(rnn.LSTM):
    step = staticmethod(clear_lstm_step)


def main(steps=100):
    """Trains a character model with each cell, and prints a table."""
    rnn.CELLS.update(original_gru=OriginalGRU, clear_lstm=ClearLSTM, peephole=PeepholeLSTM,
                     layer_norm=LayerNormLSTM)
    chance = random.Random(0)
    lengths = [chance.randint(1, 8) for _ in range(4000)]
    text = "".join("a" * n + "b" * n + "\n" for n in lengths)  # on average 10 characters a line
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    split = int(0.9 * len(ids))
    print("bits per character on held-out lines; 3 bits choose a line, so 0.300 is perfect")
    for cell in ("gru", "original_gru", "lstm", "clear_lstm", "peephole", "layer_norm"):
        torch.manual_seed(0)
        model = rnn.initialize(rnn.CharLM(len(vocab), embed=8, hidden=16, cell=cell))
        for _ in rnn.train(model, rnn.Batches(ids[:split], batch=16, context=20), steps, lr=0.03):
            pass
        print(f"{cell:14}{rnn.evaluate(model, ids[split:]) / math.log(2):.3f}")


if __name__ == "__main__":
    main()
