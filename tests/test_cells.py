"""Cells of one's own, from examples/cells.py: against their papers, and through every option."""

import pytest
import torch
from conftest import flat, small
from examples.cells import ClearLSTM, LayerNormLSTM, OriginalGRU, PeepholeLSTM
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn

I, H, B, T = 4, 5, 3, 6
LENGTHS = [6, 2, 4]  # of the packed sequences
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order

OWN = [pytest.param(cls, more, id=f"{cls.__name__}{'_proj' if more else ''}")
       for cls in (OriginalGRU, PeepholeLSTM, LayerNormLSTM, ClearLSTM)
       for more in ({}, {"proj_size": 3}) if cls is not OriginalGRU or not more]


def same(a, b):
    torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("cls,more", OWN)
def test_splitting_a_sequence_changes_nothing(cls, more):
    layer = cls(I, H, 2, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    whole, end = layer(x)
    first, state = layer(x[:2])
    second, state = layer(x[2:], state)
    same(torch.cat((first, second)), whole)
    same(state, end)


@pytest.mark.parametrize("cls,more", OWN)
def test_packed_equals_one_by_one(cls, more):
    layer = cls(I, H, 2, bidirectional=True, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    packed, state = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    output, lengths = pad_packed_sequence(packed)
    for b, n in enumerate(lengths):
        alone, alone_state = layer(x[:n, b])
        same(output[:n, b], alone)
        same([s[:, b] for s in flat(state)], flat(alone_state))


@pytest.mark.parametrize("cls,more", OWN[:-2])  # ClearLSTM only rearranges nn.LSTM's products
def test_first_and_second_derivatives(cls, more):
    """In both directions over sequences of 1 and 3 steps."""
    layer = cls(1, 3, bidirectional=True, dtype=torch.float64,
                **{name: 2 if name == "proj_size" else value for name, value in more.items()})
    x = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True)
    weights = dict(layer.named_parameters())

    def run(x, *values):
        input = pack_padded_sequence(x, [1, 3], enforce_sorted=False)
        result = torch.func.functional_call(layer, dict(zip(weights, values)), (input,))
        return tuple(flat(result))

    assert torch.autograd.gradcheck(run, (x, *weights.values()))
    assert torch.autograd.gradgradcheck(run, (x, *weights.values()))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cls,more", OWN)
def test_own_cells_have_every_option(cls, more, bias):
    """batch_first, one sequence, trace with gradients, dropout, further parameters by name."""
    options = dict(bias=bias, bidirectional=True, dropout=0.5, dtype=torch.float64, **more)
    layer = cls(I, H, 2, **options).eval()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, state, traces = layer.trace(x)
    other = cls(I, H, 2, batch_first=True, **options).eval()
    other.load_state_dict(layer.state_dict())
    same(other(x.transpose(0, 1))[0].transpose(0, 1), output)
    same(layer(x[:, 1])[0], output[:, 1])
    same(torch.cat((traces[2]["h"], traces[3]["h"]), dim=-1), output)
    for trace in traces:
        for value in trace.values():
            assert torch.autograd.grad(value.sum(), x, retain_graph=True)[0].any()
    assert not torch.equal(layer.train()(x)[0], output)
    extra = layer.extra
    assert len(list(layer.parameters())) == 4 * ((4 if bias else 2) + bool(more) + len(extra))
    for name, n in extra.items():
        assert getattr(layer, f"{name}_l1_reverse").shape == (n * H,)


def test_original_gru_is_the_papers():
    """Cho et al. 2014, written out once more; torch's form differs."""
    layer = OriginalGRU(I, H, dtype=torch.float64)
    (wr, wz, wn), (ur, uz, un) = layer.weight_ih_l0.split(H), layer.weight_hh_l0.split(H)
    br, bz, bn = (layer.bias_ih_l0 + layer.bias_hh_l0).split(H)
    h = torch.zeros(H, dtype=torch.float64)
    x = torch.randn(T, I, dtype=torch.float64)
    for t in range(T):
        r = torch.sigmoid(wr @ x[t] + ur @ h + br)
        z = torch.sigmoid(wz @ x[t] + uz @ h + bz)
        h = (1 - z) * torch.tanh(wn @ x[t] + un @ (r * h) + bn) + z * h
    same(layer(x)[1][0], h)
    theirs = with_weights_of(rnn.GRU(I, H, dtype=torch.float64), layer)
    assert not torch.allclose(theirs(x)[1][0], h)


def with_weights_of(layer, other):
    """The same values where both have a parameter; returns layer."""
    layer.load_state_dict(other.state_dict(), strict=False)
    return layer


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_unsorted"])
def test_four_products_equal_one(options, layout):
    theirs = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    clear = ClearLSTM(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    input = {"batched": x, "unbatched": x[:, 0],
             "packed_unsorted": pack_padded_sequence(x, LENGTHS, enforce_sorted=False)}[layout]
    same(flat(with_weights_of(clear, theirs)(input)), flat(theirs(input)))


def test_a_peephole_that_sees_nothing_is_an_lstm():
    options = dict(bidirectional=True, proj_size=3, dtype=torch.float64)
    layer, plain = PeepholeLSTM(I, H, 2, **options), rnn.LSTM(I, H, 2, **options)
    with_weights_of(layer, plain)
    for name, value in layer.named_parameters():
        if "peep" in name:
            nn.init.zeros_(value)
    x = torch.randn(T, B, I, dtype=torch.float64)
    x = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    same(flat(layer(x)), flat(plain(x)))
    nn.init.ones_(layer.weight_peep_l0)
    assert not torch.allclose(layer(x)[0].data, plain(x)[0].data)


def test_peephole_and_layer_norm_are_the_papers():
    """Gers & Schmidhuber 2000 and Ba et al. 2016, written out once more."""
    x = torch.randn(T, I, dtype=torch.float64)

    def normal(a):
        return (a - a.mean()) / (a.var(correction=0) + 1e-5).sqrt()

    peephole = PeepholeLSTM(I, H, dtype=torch.float64)
    normed = LayerNormLSTM(I, H, dtype=torch.float64)
    assert torch.equal(normed.norm_ih_l0, torch.ones(4 * H))  # gains begin with 1
    for name, value in normed.named_parameters():
        if name.startswith("norm"):
            nn.init.normal_(value)
    for layer in (peephole, normed):
        h = c = torch.zeros(H, dtype=torch.float64)
        p = {name: value.detach() for name, value in layer.named_parameters()}
        bias = p["bias_ih_l0"] + p["bias_hh_l0"]
        for t in range(T):
            a, b = p["weight_ih_l0"] @ x[t], p["weight_hh_l0"] @ h
            if layer is peephole:
                i, f, g, o = (a + b + bias).split(H)
                wi, wf, wo = p["weight_peep_l0"].split(H)
                c_new = torch.sigmoid(f + wf * c) * c + torch.sigmoid(i + wi * c) * torch.tanh(g)
                h = torch.sigmoid(o + wo * c_new) * torch.tanh(c_new)
            else:
                a, b = normal(a) * p["norm_ih_l0"], normal(b) * p["norm_hh_l0"]
                i, f, g, o = (a + b + bias).split(H)
                c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                shown = normal(c_new) * p["norm_c_l0"] + p["bias_c_l0"]
                h = torch.sigmoid(o) * torch.tanh(shown)
            c = c_new
        same(flat(layer(x)[1]), [h[None], c[None]])


@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"layers": 2, "dropout": 0.5}], ids=str)
@pytest.mark.parametrize("cls", [OriginalGRU, PeepholeLSTM, LayerNormLSTM])
def test_own_cells_in_a_character_model(monkeypatch, tmp_path, vocab, ids, cls, options):
    """Step by step equals all at once; a checkpoint brings every parameter back."""
    monkeypatch.setitem(rnn.CELLS, "own", cls)
    model = small(vocab, cell="own", **options).double().eval()
    x = ids[:60].view(3, 20)
    whole, _ = model(x)
    state = model.init_state(3)
    for t in range(20):
        logits, state = model(x[:, t : t + 1], state)
        same(logits[:, 0], whole[:, t])
    rnn.save(tmp_path / "own.pt", model, vocab)
    again = rnn.load(tmp_path / "own.pt")[0].eval()
    assert torch.equal(again(x)[0], whole)


@pytest.mark.parametrize("cls", [PeepholeLSTM, LayerNormLSTM])
def test_initialize_knows_own_cells(cls):
    layer = cls(I, 8, 2, proj_size=3)
    extra = {name: value.clone() for name, value in layer.named_parameters()
             if name.startswith(("weight_peep", "norm"))}
    assert extra
    rnn.initialize(layer)
    for name, value in extra.items():
        assert torch.equal(getattr(layer, name), value)
    assert torch.equal(layer.bias_ih_l1.chunk(4)[1], torch.ones(8))
