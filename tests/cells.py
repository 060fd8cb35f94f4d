"""Cells of your own, worked out: the peephole LSTM, the LSTM with layer normalization, and the LSTM
of four separate products.

A cell is a function of one step and a class that names it (see `RNNBase` in rnn.py); then it runs
through every option of the layers: stacked, in both directions, projected, packed, traced. In a
model it has a name:

    rnn.CELLS["peephole"] = PeepholeLSTM
    model = rnn.CharLM(len(vocab), cell="peephole")
"""

import torch
import torch.nn.functional as F
from torch import nn

import rnn


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

    def shapes(self, reads):
        return super().shapes(reads) | {"weight_peep": (3 * self.hidden_size,)}


def layer_norm_lstm_step(gx, state, p):
    """Ba et al. 2016: both products are normalized, before the biases are added; so is c' on its
    way to h', but not on its way to the next step."""
    h, c = state  # (B, H) each
    b_ih, b_hh, b_c = (0, 0, None) if p.bias_ih is None else (p.bias_ih, p.bias_hh, p.bias_c)
    # gx is W_ih x + b_ih, but only W_ih x is to be normalized: take b_ih out, add it afterwards.
    a = F.layer_norm(gx - b_ih, gx.shape[-1:], p.norm_ih) + b_ih + b_hh
    a = a + F.layer_norm(F.linear(h, p.weight_hh), gx.shape[-1:], p.norm_hh)  # (B, 4H)
    i, f, g, o = a.chunk(4, dim=-1)  # 4 x (B, H)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    h = o * F.layer_norm(c, c.shape[-1:], p.norm_c, b_c).tanh()
    return {"h": rnn.project(h, p), "c": c, "i": i, "f": f, "g": g, "o": o}


class LayerNormLSTM(rnn.LSTM):
    step = staticmethod(layer_norm_lstm_step)

    def shapes(self, reads):
        H = self.hidden_size
        gains = {"norm_ih": (4 * H,), "norm_hh": (4 * H,), "norm_c": (H,)}
        return super().shapes(reads) | gains | ({"bias_c": (H,)} if self.bias else {})

    def reset_parameters(self):
        super().reset_parameters()
        for name, value in self.named_parameters():
            if name.startswith("norm"):
                nn.init.ones_(value)


def clear_lstm_step(gx, state, p):
    """An LSTM as it is written on paper: for each gate its own matrices and its own product."""
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
