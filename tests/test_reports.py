"""Faults that users of other projects reported, and that an earlier version of this one had too.

One test or more for each; the docstring names the kind of fault, and the report that showed it.
The faults of train_shakespeare.py are in test_script.py.
"""

import copy
import math
import os
import pathlib

import pytest
import torch
from conftest import small
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnn

I, H, B, T = 4, 5, 3, 6


# ---- What save writes, load reads: nanoGPT 325, pytorch 101107 ----


class Louder(rnn.CharLM):
    """The same parameters, another function."""

    def forward(self, ids, state=None):
        logits, state = super().forward(ids, state)
        return 2 * logits, state


def deeper(model):
    model.rnn = rnn.LSTM(8, 12, 2)
    return model


def normed(model):
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


def test_a_compiled_model_is_saved_as_the_model_it_wraps(vocab, tmp_path):
    """What save writes, load reads: nanoGPT 325."""
    model = small(vocab)
    rnn.save(tmp_path / "a.pt", torch.compile(model, backend="eager"), vocab)
    again = rnn.load(tmp_path / "a.pt")[0].state_dict()
    assert list(again) == list(model.state_dict())
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", [
    lambda model: nn.DataParallel(model), deeper, normed, lambda model: nn.Linear(2, 2),
    lambda model: Louder(model.vocab_size, 8, 12)],
    ids=["DataParallel", "other_layers", "weight_norm", "Linear", "subclass"])
def test_what_cannot_be_read_back_leaves_the_old_file(vocab, tmp_path, change):
    """What save writes, load reads: pytorch 101107."""
    rnn.save(tmp_path / "a.pt", small(vocab), vocab, version=1)
    with pytest.raises((TypeError, ValueError)):
        rnn.save(tmp_path / "a.pt", change(small(vocab)), vocab, version=2)
    assert rnn.load(tmp_path / "a.pt")[2] == {"version": 1} and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("what", ["path", "vocabulary"])
def test_values_that_cannot_be_read_back_leave_the_old_file(vocab, tmp_path, what):
    """What save writes, load reads: pytorch 101107, for what stands beside the weights."""
    rnn.save(tmp_path / "a.pt", small(vocab), vocab, version=1)
    other = rnn.Vocab.of("ab") if what == "vocabulary" else vocab
    training = {"folder": pathlib.Path("out")} if what == "path" else {}
    with pytest.raises(ValueError):
        rnn.save(tmp_path / "a.pt", small(vocab), other, **training)
    assert rnn.load(tmp_path / "a.pt")[2] == {"version": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_a_checkpoint_that_is_a_link_stays_one(vocab, tmp_path):
    """Small: the file that a symbolic link names is the one that is written."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "a.pt").symlink_to(pathlib.Path("kept") / "b.pt")  # does not exist yet
    for version in (1, 2):
        rnn.save(tmp_path / "a.pt", small(vocab), vocab, version=version)
        assert (tmp_path / "a.pt").is_symlink()
        assert rnn.load(tmp_path / "kept" / "b.pt")[2] == {"version": version}
    assert os.listdir(tmp_path / "kept") == ["b.pt"]


# ---- Types under autocast: pytorch 45048 ----


def summing(layer, suffix=""):
    """c grows by i * g = 0.5 * 0.01332 a step, and nothing is forgotten: 2.664 after 400."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    bias = getattr(layer, "bias_ih" + suffix).detach().chunk(4)
    bias[1].fill_(20.0)
    bias[2].fill_(math.atanh(0.01332))
    return layer


def test_a_cell_state_keeps_float32_under_autocast():
    """Types under autocast: pytorch 45048. In bfloat16 2 + 0.007 is 2."""
    cell, state = summing(rnn.LSTMCell(I, H)), None
    for _ in range(400):
        with torch.autocast("cpu", torch.bfloat16):
            state = cell(torch.zeros(B, I), state)
    assert state[1].dtype == torch.float32
    torch.testing.assert_close(state[1], torch.full((B, H), 2.664), rtol=0.005, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_layer_sums_in_float32_under_autocast(path, packed):
    """Types under autocast: pytorch 45048, within a layer; the result is rounded once."""
    layer, x = summing(rnn.LSTM(I, H), "_l0"), torch.zeros(400, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        _, (_, c) = layer(pack_padded_sequence(x, [400, 200, 400], enforce_sorted=False)
                          if packed else x)
    expected = torch.tensor([2.664, 1.332 if packed else 2.664, 2.664])
    torch.testing.assert_close(c[0].float(), expected[:, None].expand(B, H), rtol=0.01, atol=0)


@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("wrong", ["input", "state", "weights"])
def test_float64_under_autocast_is_an_error_on_both_paths(path, wrong, steps):
    """Two paths, two behaviours: torch.nn raises, so both do."""
    for module in (nn, rnn):
        layer, x = module.LSTM(I, H), torch.randn(steps, B, I)
        state = (torch.zeros(1, B, H),) * 2
        if wrong == "input":
            x = x.double()
        elif wrong == "state":
            state = rnn.map_state(torch.Tensor.double, state)
        else:
            layer.double()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            layer(x, state)


# ---- Non-finite numbers outside training: OpenChatKit 86 ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["output.weight", "output.bias", "embedding.weight"])
def test_generate_says_that_the_logits_are_not_finite(vocab, value, where):
    """Non-finite numbers outside training: OpenChatKit 86."""
    model = small(vocab)
    with torch.no_grad():
        model.get_parameter(where)[:] = value
    for options in ({}, {"temperature": 0}, {"top_k": 1}):
        with pytest.raises(FloatingPointError, match="not finite"):
            "".join(rnn.generate(model, vocab, "Ann", 20, **options))


@pytest.mark.parametrize("where", ["output.bias", "rnn.weight_hh_l0"])
def test_evaluate_ends_at_once_where_the_loss_is_not_finite(vocab, ids, where):
    """Non-finite numbers outside training: OpenChatKit 86. NaN never equals NaN, so all passes
    would run."""
    model, calls = small(vocab), []
    with torch.no_grad():
        model.get_parameter(where)[0] = math.nan
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        rnn.evaluate(model, ids[:1000], batch=64, context=256)
    assert len(calls) == 1


@pytest.mark.parametrize("loss", [100.0, 700.0, 800.0])
def test_perplexity_of_any_loss(vocab, ids, loss):
    """Range of exp: fairseq 1833."""
    model = small(vocab)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.output.bias[vocab.index["A"]] = loss  # the loss of each other symbol
    x = torch.full((40,), vocab.index["B"])
    assert rnn.evaluate(model, x) == pytest.approx(loss, rel=1e-6)
    expected = math.exp(loss) if loss < 709 else math.inf
    assert rnn.perplexity(model, x) == pytest.approx(expected, rel=1e-6 * loss)


# ---- The caller's state: Lightning 2551 ----


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def with_a_frozen_part(vocab):
    model = small(vocab, layers=2, dropout=0.5)
    model.train()
    model.embed_dropout.eval()
    return model


def test_each_module_keeps_its_mode(vocab, ids):
    """The caller's state: Lightning 2551."""
    model = with_a_frozen_part(vocab)
    before = modes(model)
    assert len(set(before.values())) == 2
    rnn.evaluate(model, ids[:100])
    assert modes(model) == before
    "".join(rnn.generate(model, vocab, "Ann", 3))
    assert modes(model) == before
    for _ in rnn.train(model, rnn.Batches(ids, 4, 16), 2):
        assert modes(model) == before


def test_modes_come_back_after_an_error_and_when_nobody_reads_on(vocab, ids):
    """The caller's state: Lightning 2551, where a call does not end as planned."""
    model = with_a_frozen_part(vocab)
    before = modes(model)
    with pytest.raises(IndexError):
        rnn.evaluate(model, torch.full((100,), len(vocab)))
    symbols = rnn.generate(model, vocab, "Ann", 30)
    next(symbols)
    assert modes(model) == before  # between two symbols the model is the caller's
    model.eval()
    next(symbols)
    assert not any(modes(model).values())
    symbols.close()
    with torch.inference_mode():
        rnn.evaluate(model, ids[:100])
    assert not any(modes(model).values()) and torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---- Numbers that become constants: pytorch 15319, 24235 ----


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch's own layers give it too
def test_export_leaves_the_batch_open(path, vocab, ids):
    """Numbers that become constants: pytorch 15319, 24235. With the state as an argument too."""
    model = small(vocab, layers=2).double().eval()
    batch = torch.export.Dim("batch")
    start = model.init_state(4)  # were h and c one tensor, c would be h in the program
    program = torch.export.export(model, (ids[:20].view(4, 5), start),
                                  dynamic_shapes=({0: batch}, ({1: batch}, {1: batch})))
    for rows in (1, 2, 9):
        x = ids[: 5 * rows].view(rows, 5)
        state = tuple(torch.randn(2, rows, 12, dtype=torch.float64) for _ in range(2))
        for a, b in zip(program.module()(x, state), model(x, state)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiled_layers_read_batches_of_any_size(path):
    """Numbers that become constants: pytorch 15319, with torch.compile."""
    torch._dynamo.reset()
    layer = rnn.GRU(I, H, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 1):
        x = torch.randn(T, rows, I, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # torch announces another way to quantize
def test_quantized_by_way_of_torchs_layer():
    """The drop-in's edges: pytorch PR 25954. quantize_dynamic knows torch.nn's classes only."""
    if not set(torch.backends.quantized.supported_engines) - {"none"}:
        pytest.skip("this torch cannot quantize")
    ours, x = rnn.LSTM(I, 32, 2), torch.randn(T, B, I)
    theirs = nn.LSTM(I, 32, 2)
    theirs.load_state_dict(ours.state_dict())
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs), {nn.LSTM},
                                                   dtype=torch.qint8)
    assert not isinstance(model[0], nn.LSTM)
    torch.testing.assert_close(model(x)[0], ours(x)[0], rtol=0, atol=0.02)  # 8 bits


# ---- Parameters found by the start of a name: cleanrl 358 ----


def old_weight_norm(layer, name):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, name)


def pruned(layer, name):
    prune.l1_unstructured(layer, name, 0.5)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, old_weight_norm, pruned,
                                    parametrizations.spectral_norm])
@pytest.mark.parametrize("layer,name", [
    (rnn.LSTM(I, H), "weight_hh_l0"), (rnn.GRUCell(I, H), "weight_ih"), (nn.Linear(I, H), "weight"),
    (nn.LSTM(I, H, bidirectional=True), "weight_ih_l0_reverse")], ids=str)
def test_initialize_says_where_it_cannot_reach_a_weight(change, layer, name):
    """Parameters found by the start of a name: cleanrl 358."""
    layer = copy.deepcopy(layer)
    change(layer, name)
    with pytest.raises(ValueError, match="weight_norm"):
        rnn.initialize(nn.Sequential(nn.Linear(2, 2), layer))


def test_initialize_leaves_other_modules_alone():
    """Parameters found by the start of a name: cleanrl 358. These have a weight and a bias, too."""
    others = nn.Sequential(nn.LayerNorm(H), nn.Embedding(3, H), nn.Conv1d(I, H, 2),
                           nn.Bilinear(2, 2, 2), nn.BatchNorm1d(H))
    before = {name: value.clone() for name, value in others.state_dict().items()}
    rnn.initialize(nn.Sequential(others, rnn.GRU(I, H)))
    assert all(torch.equal(before[name], value) for name, value in others.state_dict().items())


# ---- Small ----


@pytest.mark.parametrize("ids", [[-1], [0, -3], [99], torch.tensor([1, -1])], ids=str)
def test_an_index_that_no_symbol_has(ids):
    """Small: a negative index counted from the end."""
    with pytest.raises((ValueError, IndexError)):
        rnn.Vocab.of("abc").decode(ids)


def test_batches_of_a_list():
    """Small: a text need not be a tensor."""
    x, y = rnn.Batches(list(range(20)), 2, 5).next()
    assert x.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]] and torch.equal(y, x + 1)
