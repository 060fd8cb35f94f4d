"""What rnn.py promises, on one page: read this file first. The others go into every corner."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn

T, B, I, H = 6, 3, 4, 5
LAYERS = {"RNN": {}, "GRU": {}, "LSTM": {}}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; sums in another order lose a few


def make(module, name, **options):
    torch.manual_seed(0)
    return getattr(module, name)(I, H, dtype=torch.float64, **options)


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in tensors(v)]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}],
                         ids=["simple", "stacked"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_drop_ins(name, options):
    """Same seed, same parameters; same outputs, states and gradients as torch.nn."""
    theirs, ours = make(nn, name, **options), make(rnn, name, **options)
    assert isinstance(ours, nn.RNNBase) and repr(ours) == repr(theirs)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = []
    for layer in (theirs, ours):
        result = tensors(layer(x))
        gradients = torch.autograd.grad(sum(r.sin().sum() for r in result), layer.parameters())
        results.append([*layer.parameters(), *result, *gradients])
    torch.testing.assert_close(results[1], results[0], **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_cells_are_drop_ins(name):
    theirs, ours = make(nn, f"{name}Cell"), make(rnn, f"{name}Cell")
    x = torch.randn(B, I, dtype=torch.float64)
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)), **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives(name):
    layer, x = make(rnn, name), torch.randn(2, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_equals_one_by_one_and_split_equals_whole(name):
    layer, x = make(rnn, name), torch.randn(T, B, I, dtype=torch.float64)
    packed, _ = layer(pack_padded_sequence(x, [3, 6, 1], enforce_sorted=False))
    output, lengths = pad_packed_sequence(packed)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, b], layer(x[:length, b])[0], **EXACT)
    first, state = layer(x[:2])
    torch.testing.assert_close(torch.cat((first, layer(x[2:], state)[0])), layer(x)[0], **EXACT)


def test_trace_shows_every_gate():
    layer, x = make(rnn, "LSTM"), torch.randn(T, B, I, dtype=torch.float64)
    output, _, (trace,) = layer.trace(x)
    assert list(trace) == ["h", "c", "i", "f", "g", "o"] and trace["f"].shape == (T, B, H)
    torch.testing.assert_close(trace["h"], output)
    torch.testing.assert_close(trace["o"] * trace["c"].tanh(), output, **EXACT)


def test_a_cell_of_your_own():
    def step(gx, state, p):
        i, f, g, o = gx.chunk(4, dim=-1)  # without W_hh: it cannot see the past but through c
        c = p.weight_keep.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return {"h": o.sigmoid() * c.tanh(), "c": c, "f": f}

    class Own(rnn.LSTM):
        extra = {"weight_keep": 1}

    Own.step = staticmethod(step)
    layer = Own(I, H, num_layers=2, bidirectional=True)
    assert layer.weight_keep_l1_reverse.shape == (H,)
    assert layer(torch.randn(T, B, I))[0].shape == (T, B, 2 * H)


def test_the_fused_lstm_equals_the_plain_one(path):
    """`path` runs this test on each of the two; csrc/ is compiled if there is a compiler."""
    theirs, ours = make(nn, "LSTM"), make(rnn, "LSTM")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    results = [torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()])
               for layer in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_a_model_learns_evaluates_saves_and_writes(tmp_path):
    text = "to be or not to be, that is the question. " * 40
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(len(vocab), embed=8, hidden=32))
    before = rnn.evaluate(model, ids[-200:])
    steps = list(rnn.train(model, rnn.Batches(ids[:-200], 8, 16), steps=120, lr=1e-2))
    after = rnn.evaluate(model, ids[-200:])
    assert len(steps) == 120 and abs(before - math.log(len(vocab))) < 0.5 and after < 0.3
    logits, _ = model(ids[None, -200:-1])  # the same loss, read in one piece
    assert math.isclose(after, rnn.cross_entropy(logits, ids[None, -199:]).item(), rel_tol=1e-4)
    rnn.save(tmp_path / "model.pt", model, vocab, note="any")
    loaded, vocab, training = rnn.load(tmp_path / "model.pt")
    assert training == {"note": "any"} and rnn.evaluate(loaded, ids[-200:]) == after
    written = "".join(rnn.generate(loaded, vocab, "to be or not", 30, temperature=0))
    assert "to be or not" + written in text
