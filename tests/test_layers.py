"""The layers and cells against torch.nn in float64, and what torch.nn cannot do."""

import copy
import io
import pickle
import sys
import types
import unittest
import warnings

import pytest
import torch
from cells import ClearLSTM, LayerNormLSTM, PeepholeLSTM
from conftest import KINDS
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn

# torch's own test inputs import a package for other tests of theirs; its place may stay empty.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal import common_modules  # noqa: E402

I, H, B, T = 4, 5, 3, 6
LENGTHS = [6, 2, 4]  # of the packed sequences
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order

pytestmark = pytest.mark.usefixtures("path")  # everything twice: plain and fused


def pair(kind, layers=1, dtype=torch.float64, **options):
    """The same layer of torch and of this library, each made from the same seed."""
    name, more = KINDS[kind]
    made = []
    for module in (nn, rnn):
        torch.manual_seed(7)
        made.append(getattr(module, name)(I, H, layers, dtype=dtype, **more, **options))
    return made


def inputs(layout, batch_first, dtype=torch.float64):
    """An input in the given layout, and the leaf tensor it is made of."""
    torch.manual_seed(1)
    if layout == "unbatched":
        x = torch.randn(T, I, dtype=dtype, requires_grad=True)
        return x, x
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=dtype, requires_grad=True)
    if layout == "batched":
        return x, x
    lengths = sorted(LENGTHS, reverse=True) if layout == "packed_sorted" else LENGTHS
    return pack_padded_sequence(x, lengths, batch_first, layout == "packed_sorted"), x


def state_for(layer, layout, dtype=torch.float64):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    torch.manual_seed(2)
    shapes = [(rows, width) if layout == "unbatched" else (rows, B, width)
              for width in (layer.proj_size or H, H)]
    state = tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    return state if isinstance(layer, (nn.LSTM, rnn.LSTM)) else state[0]


def flat(value):
    """All tensors in nested tuples, packed sequences and None."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for v in value or () for t in flat(v)]


def gradients(result, leaves):
    """Of a sum that weighs every result differently."""
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum()
               for r in flat(result))
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_sorted", "packed_unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_drop_in(kind, layers, bias, batch_first, bidirectional, layout, given):
    """Same seed, same parameters bit for bit; outputs, state and every gradient agree."""
    theirs, ours = pair(kind, layers, bias=bias, batch_first=batch_first,
                        bidirectional=bidirectional)
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters()))
    results = []
    for layer in (theirs, ours):
        input, x = inputs(layout, batch_first)
        hx = state_for(layer, layout) if given else None
        result = layer(input, hx)
        results.append((result, gradients(result, [x, *flat(hx), *layer.parameters()])))
    torch.testing.assert_close(flat(results[1][0]), flat(results[0][0]), **TIGHT)
    torch.testing.assert_close(results[1][1], results[0][1], **TIGHT)
    if layout.startswith("packed"):
        for a, b in zip(results[0][0][0][1:], results[1][0][0][1:]):
            assert (a is None and b is None) or torch.equal(a, b)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)
    for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_dropout_between_layers_is_torchs(kind):
    theirs, ours = pair(kind, 3, dropout=0.4)
    results = []
    for layer in (theirs, ours):
        input, _ = inputs("batched", False)
        torch.manual_seed(3)
        results.append(flat(layer(input)))
    torch.testing.assert_close(results[1], results[0], **TIGHT)
    assert not torch.equal(results[1][0], ours.eval()(input)[0])


@pytest.mark.parametrize("cell,more", [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}),
                                       ("LSTMCell", {}), ("GRUCell", {})])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (B,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_cells_are_drop_ins(cell, more, bias, shape, given):
    results = []
    for module in (nn, rnn):
        torch.manual_seed(7)
        layer = getattr(module, cell)(I, H, bias, dtype=torch.float64, **more)
        x = torch.randn(*shape, I, dtype=torch.float64, requires_grad=True)
        hx = torch.randn(2, *shape, H, dtype=torch.float64, requires_grad=True).unbind()
        hx = (hx if cell == "LSTMCell" else hx[0]) if given else None
        result = layer(x, hx)
        results.append([*flat(result), *gradients(result, [x, *flat(hx), *layer.parameters()])])
        results[-1] += list(layer.state_dict().values())
    torch.testing.assert_close(results[1], results[0], **TIGHT)
    assert repr(layer) == repr(getattr(nn, cell)(I, H, bias, **more))


MODULES = {f"{kind}{cell}": getattr(rnn, f"{kind}{cell}")
           for kind in ("RNN", "LSTM", "GRU") for cell in ("", "Cell")}
SAMPLES = [info for info in common_modules.module_db if info.name.removeprefix("nn.") in MODULES]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("info", SAMPLES, ids=lambda info: info.name)
def test_torchs_own_samples(info, training):
    """torch's module tests call a layer unbatched and compare it with itself batched."""
    module = MODULES[info.name.removeprefix("nn.")]
    samples = info.module_inputs_func(info, "cpu", torch.float64, True, training)
    assert samples
    for sample in samples:
        make, call = sample.constructor_input, sample.forward_input
        layer = module(*make.args, **make.kwargs, dtype=torch.float64).train(training)
        result = layer(*call.args, **call.kwargs)
        expected = sample.reference_fn(layer, *call.args, **call.kwargs)
        torch.testing.assert_close(flat(result), flat(expected))
        sum(r.sum() for r in flat(result)).backward()  # in eval mode, too
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("info", [i for i in SAMPLES if i.module_error_inputs_func],
                         ids=lambda info: info.name)
def test_torchs_own_error_samples(info):
    module = MODULES[info.name.removeprefix("nn.")]
    samples = info.module_error_inputs_func(info, "cpu", torch.float64, False, True)
    assert samples
    for sample in samples:
        make, call = (sample.module_error_input.constructor_input,
                      sample.module_error_input.forward_input)
        dtype = {} if "dtype" in make.kwargs else {"dtype": torch.float64}
        if sample.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type):
                module(*make.args, **make.kwargs, **dtype)
        else:
            layer = module(*make.args, **make.kwargs, **dtype)
            with pytest.raises(sample.error_type):
                layer(*call.args, **call.kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,arguments,error,message", [
    ("dropout", {"dropout": 1.5}, ValueError, r"range \[0, 1\], got 1.5"),
    ("dropout_text", {"dropout": "much"}, ValueError, r"range \[0, 1\], got much"),
    ("proj", {"proj_size": H}, ValueError, "proj_size"),
    ("layers", {"num_layers": 0}, ValueError, "num_layers must be greater than zero, got 0"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments(kind, name, arguments, error, message):
    cls, more = KINDS[kind]
    with pytest.raises(error, match=message):
        getattr(rnn, cls)(I, H, **{**more, **arguments})


def test_dropout_of_one_layer_warns_and_nonlinearity_is_checked():
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        rnn.LSTM(I, H, dropout=0.5)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        rnn.RNN(I, H, nonlinearity="gelu")
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        rnn.RNNCell(I, H, nonlinearity="gelu")


LSTM_STATE = (torch.zeros(1, B, H), torch.zeros(1, B, H))


@pytest.mark.parametrize("input,hx,error,message", [
    (torch.zeros(I), None, ValueError, "2D or 3D, got 1D"),
    (torch.zeros(T, B, I + 1), None, RuntimeError, rf"input.size\(-1\) {I}.*, got {I + 1}"),
    (torch.zeros(0, B, I), None, RuntimeError, "sequence length to be larger than 0"),
    (torch.zeros(T, B, I).double(), None, ValueError, r"float64\) does not match weight dtype"),
    (torch.zeros(T, B, I, device="meta"), None, RuntimeError, "on cpu, got .* on meta"),
    (torch.zeros(T, B, I), torch.zeros(1, B, H), TypeError, r"tuple \(h, c\)"),
    (torch.zeros(T, B, I), LSTM_STATE[:1], TypeError, r"tuple \(h, c\)"),
    (torch.zeros(T, B, I), (LSTM_STATE[0], torch.zeros(2, B, H)), RuntimeError,
     r"hidden\[1\] size \(1, 3, 5\).*got \[2, 3, 5\]"),
    (torch.zeros(T, B, I), (torch.zeros(1, B + 1, H),) * 2, RuntimeError, r"got \[1, 4, 5\]"),
    (torch.zeros(T, I), LSTM_STATE, RuntimeError, r"size \(1, 5\).*got \[1, 3, 5\]"),
    (torch.zeros(T, B, I), (LSTM_STATE[0].double(),) * 2, RuntimeError, "got .*float64"),
    (torch.zeros(T, B, I), (LSTM_STATE[0].to("meta"),) * 2, RuntimeError, "got .*on meta"),
])
def test_wrong_input(input, hx, error, message):
    with pytest.raises(error, match=message):
        rnn.LSTM(I, H)(input, hx)
    if hx is None:
        with pytest.raises(error, match=message):
            rnn.GRU(I, H)(input)


@pytest.mark.parametrize("shape", [(B, I), (I,)], ids=str)
def test_trace_of_a_cell(shape):
    cell, x = rnn.LSTMCell(I, H), torch.randn(shape)
    _, (h, c), (trace,) = cell.trace(x)
    assert list(trace) == ["h", "c", "i", "f", "g", "o"]
    assert torch.equal(trace["h"], h) and torch.equal(trace["c"], c) and h.shape == (*shape[:-1], H)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_take_no_other_arguments(cell):
    for name in ("num_layers", "bidirectional", "proj_size"):
        with pytest.raises(TypeError, match=name):
            getattr(rnn, cell)(I, H, **{name: 2})


def test_gru_takes_a_tensor_as_state():
    with pytest.raises(TypeError, match="GRU: Expected hx to be a tensor"):
        rnn.GRU(I, H)(torch.zeros(T, B, I), LSTM_STATE)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    theirs, ours = pair(kind, 2, bidirectional=True)
    x = torch.zeros(T, 0, I, dtype=torch.float64)
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(theirs(x))]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_moves(kind):
    _, layer = pair(kind, 2, bidirectional=True)
    x, _ = inputs("batched", False)
    expected = layer(x)[0]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)),
                  torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x)[0], expected)
    assert layer.flatten_parameters() is None
    assert layer.to(torch.float32)(x.float())[0].dtype == torch.float32
    layer.weight_ih_l0 = nn.Parameter(torch.zeros_like(layer.weight_ih_l0))
    assert not torch.allclose(layer(x.float())[0], expected.float())  # the new weights are used


ALL_LAYERS = [pytest.param(getattr(rnn, cls), more, id=kind)
              for kind, (cls, more) in KINDS.items()]
ALL_LAYERS += [pytest.param(rnn.OriginalGRU, {}, id="original_gru")]
ALL_LAYERS += [pytest.param(cls, more, id=f"{cls.__name__}{'_proj' if more else ''}")
               for cls in (PeepholeLSTM, LayerNormLSTM) for more in ({}, {"proj_size": 3})]


@pytest.mark.parametrize("cls,more", ALL_LAYERS)
def test_splitting_a_sequence_changes_nothing(cls, more):
    layer = cls(I, H, 2, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    whole, end = layer(x)
    first, state = layer(x[:2])
    second, state = layer(x[2:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole, **TIGHT)
    torch.testing.assert_close(state, end, **TIGHT)


@pytest.mark.parametrize("cls,more", ALL_LAYERS)
def test_packed_equals_one_by_one(cls, more):
    layer = cls(I, H, 2, bidirectional=True, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    packed, state = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    output, lengths = pad_packed_sequence(packed)
    for b, n in enumerate(lengths):
        alone, alone_state = layer(x[:n, b])
        torch.testing.assert_close(output[:n, b], alone, **TIGHT)
        torch.testing.assert_close([s[:, b] for s in flat(state)], flat(alone_state), **TIGHT)


@pytest.mark.parametrize("cls,more", ALL_LAYERS)
@pytest.mark.parametrize("layout", ["batched", "packed_unsorted"])
def test_first_and_second_derivatives(cls, more, layout):
    """nn.LSTM has no second derivative on the GPU, and none through oneDNN."""
    layer = cls(2, 3, bidirectional=True, dtype=torch.float64,
                **{name: 2 if name == "proj_size" else value for name, value in more.items()})
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = dict(layer.named_parameters())

    def run(x, *values):
        input = x if layout == "batched" else pack_padded_sequence(x, [1, 3], enforce_sorted=False)
        result = torch.func.functional_call(layer, dict(zip(weights, values)), (input,))
        return tuple(flat(result))

    if more.get("nonlinearity") != "relu":  # its kinks are no place for finite differences
        assert torch.autograd.gradcheck(run, (x, *weights.values()))
        assert torch.autograd.gradgradcheck(run, (x, *weights.values()))


def test_original_gru_is_the_paper_s():
    """Cho et al. 2014, written out once more for a single unit."""
    cell = rnn.OriginalGRU(1, 1, dtype=torch.float64)
    (wr, wz, wn), (ur, uz, un) = cell.weight_ih_l0.flatten(), cell.weight_hh_l0.flatten()
    br, bz, bn = cell.bias_ih_l0 + cell.bias_hh_l0
    h = torch.zeros((), dtype=torch.float64)
    x = torch.randn(T, dtype=torch.float64)
    for t in range(T):
        r, z = torch.sigmoid(wr * x[t] + ur * h + br), torch.sigmoid(wz * x[t] + uz * h + bz)
        h = (1 - z) * torch.tanh(wn * x[t] + un * (r * h) + bn) + z * h
    torch.testing.assert_close(cell(x[:, None])[1].squeeze(), h, **TIGHT)


@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_unsorted"])
def test_trace_shows_every_state_and_gate(layout):
    layer = rnn.LSTM(I, H, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    input, x = inputs(layout, True)
    output, (h, c), traces = layer.trace(input)
    torch.testing.assert_close(flat(output), flat(layer(input)[0]), **TIGHT)
    assert len(traces) == 4 and all(list(t) == ["h", "c", "i", "f", "g", "o"] for t in traces)
    torch.testing.assert_close(torch.cat(flat(t["h"] for t in traces[2:]), -1), *flat(output))
    for trace in traces:  # the cell's equation holds between the parts
        h_, c_, _, _, _, o = (flat(trace[name])[0] for name in trace)
        torch.testing.assert_close(h_, o * c_.tanh(), **TIGHT)
    if layout != "packed_unsorted":
        last = traces[2]["c"][..., -1, :]  # the last layer, forwards, at the last step
        torch.testing.assert_close(last, c[2], **TIGHT)
    assert torch.autograd.grad(sum(flat(traces[0]["f"])).sum(), x)[0].abs().sum() > 0


def with_weights_of(layer, other):
    """The same values where both have a parameter; returns layer."""
    layer.load_state_dict(other.state_dict(), strict=False)
    return layer


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_unsorted"])
def test_four_products_equal_one(options, layout):
    theirs = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    clear = ClearLSTM(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    x, _ = inputs(layout, False)
    torch.testing.assert_close(flat(with_weights_of(clear, theirs)(x)), flat(theirs(x)), **TIGHT)


def test_a_peephole_that_sees_nothing_is_an_lstm():
    options = dict(bidirectional=True, proj_size=3, dtype=torch.float64)
    layer, plain = PeepholeLSTM(I, H, 2, **options), rnn.LSTM(I, H, 2, **options)
    with_weights_of(layer, plain)
    for name, value in layer.named_parameters():
        if "peep" in name:
            nn.init.zeros_(value)
    x, _ = inputs("packed_unsorted", False)
    torch.testing.assert_close(flat(layer(x)), flat(plain(x)), **TIGHT)
    nn.init.ones_(layer.weight_peep_l0)
    assert not torch.allclose(layer(x)[0].data, plain(x)[0].data)


def test_peephole_and_layer_norm_are_the_papers_():
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
        torch.testing.assert_close(flat(layer(x)[1]), [h[None], c[None]], **TIGHT)


def test_variational_dropout_has_one_mask_per_sequence():
    """The second layer sees the same units of the first at every step, packed or not; others in
    other sequences."""
    layer = rnn.RNN(I, 50, 2, dropout=0.5, dtype=torch.float64)
    layer.variational = True
    seen = []
    layer._direction = lambda x, *rest: (seen.append(x), rnn.RNN._direction(layer, x, *rest))[1]
    x = torch.rand(T, B, I, dtype=torch.float64)
    for input, sizes in ((x, [B] * T), (pack_padded_sequence(x, LENGTHS, False, False), None)):
        seen.clear()
        layer(input)
        zero = (seen[1] == 0).split(sizes or input.batch_sizes.tolist())  # T x (B_t, 50)
        assert all(torch.equal(z, zero[0][:len(z)]) for z in zero)
        assert not torch.equal(zero[0][0], zero[0][1])
        kept = seen[1][seen[1] != 0].abs().max()
        assert kept <= 2 and 0.3 < zero[0].double().mean() < 0.7  # kept ones are doubled
    layer.eval()
    plain = with_weights_of(rnn.RNN(I, 50, 2, dtype=torch.float64), layer)
    torch.testing.assert_close(layer(x)[0], plain(x)[0], **TIGHT)


def test_initialize():
    layer = rnn.initialize(rnn.LSTM(64, 32, 2, bidirectional=True))
    for k in range(2):
        for suffix in (f"_l{k}", f"_l{k}_reverse"):
            bias = getattr(layer, "bias_ih" + suffix) + getattr(layer, "bias_hh" + suffix)
            i, f, g, o = bias.chunk(4)
            assert torch.equal(f, torch.ones(32)) and not (i.any() or g.any() or o.any())
            for block in getattr(layer, "weight_hh" + suffix).chunk(4):
                torch.testing.assert_close(block @ block.T, torch.eye(32), rtol=0, atol=1e-5)
    bound = (6 / (64 + 32)) ** 0.5  # Xavier, for each gate's (32, 64) block
    assert 0.95 * bound < layer.weight_ih_l0.abs().max() <= bound
    gru = rnn.initialize(rnn.GRU(4, 8))
    assert not gru.bias_ih_l0.any() and not gru.bias_hh_l0.any()
    with_projection = rnn.initialize(rnn.LSTM(4, 8, proj_size=3))
    for block in with_projection.weight_hh_l0.chunk(4):  # (8, 3): orthonormal columns
        torch.testing.assert_close(block.T @ block, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_autocast_stays_close_and_has_the_types_of_torch(kind, path):
    name, further = KINDS[kind]
    ours, theirs = (getattr(m, name)(I, H, 2, **further) for m in (rnn, nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        (y, state), (y2, state2) = ours(x), theirs(x)
    assert y.dtype == y2.dtype
    assert [s.dtype for s in state] == [s.dtype for s in state2]
    torch.testing.assert_close(y.float(), ours(x)[0], rtol=0, atol=0.02)  # bfloat16: 3 digits


def test_layers_make_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn.LSTM(I, H, 2, dropout=0.1)(torch.zeros(T, B, I))
