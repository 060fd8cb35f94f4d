"""The layers and cells against torch.nn in float64: results, gradients, arguments and errors."""

import sys
import types
import unittest
import warnings

import pytest
import torch
from conftest import KINDS, flat
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn

# torch's own test inputs import a package for other tests of theirs; its place may stay empty.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
try:
    from torch.testing._internal import common_modules
except ModuleNotFoundError:  # it needs NumPy; this project does not
    common_modules = types.SimpleNamespace(module_db=[])

I, H, B, T = 4, 5, 3, 6
LENGTHS = [6, 2, 4]  # of the packed sequences
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order


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
    return state if layer.mode == "LSTM" else state[0]


def gradients(result, leaves):
    """Of a sum that weighs every result differently."""
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum()
               for r in flat(result))
    return torch.autograd.grad(loss, leaves)


# ---- The same results ----


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_sorted", "packed_unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("layers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_drop_in(path, kind, layers, bias, batch_first, bidirectional, layout, given):
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
def test_dropout_between_layers_is_torchs(path, kind):
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
@pytest.mark.parametrize("shape", [(), (B,), (0,)], ids=["unbatched", "batched", "empty"])
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
def test_torchs_own_samples(path, info, training):
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


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(path, kind):
    theirs, ours = pair(kind, 2, bidirectional=True)
    x = torch.zeros(T, 0, I, dtype=torch.float64)
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(theirs(x))]


# ---- The same arguments, attributes and errors ----


def error_of(call):
    with pytest.raises(Exception) as caught:  # noqa: B017 - which one is what is compared
        call()
    return caught.value


@pytest.mark.parametrize("info", [i for i in SAMPLES if i.module_error_inputs_func],
                         ids=lambda info: info.name)
def test_torchs_own_error_samples(path, info):
    module = MODULES[info.name.removeprefix("nn.")]
    samples = info.module_error_inputs_func(info, "cpu", torch.float64, False, True)
    assert samples
    for sample in samples:
        make, call = (sample.module_error_input.constructor_input,
                      sample.module_error_input.forward_input)
        dtype = {} if "dtype" in make.kwargs else {"dtype": torch.float64}
        if sample.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            error = error_of(lambda: module(*make.args, **make.kwargs, **dtype))
        else:
            layer = module(*make.args, **make.kwargs, **dtype)
            error = error_of(lambda: layer(*call.args, **call.kwargs))
        assert type(error) is sample.error_type


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [
    {"dropout": 1.5}, {"dropout": "much"}, {"dropout": True}, {"proj_size": H},
    {"proj_size": -1}, {"num_layers": 0}, {"num_layers": -1}, {"num_layers": 2.0}, {"bias": 1},
    {"batch_first": None}, {"dtype": torch.int32}, {"device": "nowhere"}, {"hidden_size": 0},
    {"input_size": 0}, {"input_size": "4"}, {"hidden_size": 2.5}, {"more": 1}], ids=str)
def test_wrong_arguments_are_torchs_errors(kind, arguments):
    name, more = KINDS[kind]
    arguments = {"input_size": I, "hidden_size": H, **more, **arguments}
    theirs, ours = (error_of(lambda: getattr(module, name)(**arguments)) for module in (nn, rnn))
    assert type(ours) is type(theirs)
    if type(theirs) is not TypeError:  # these name torch's own functions
        assert str(ours) == str(theirs)


def test_wrong_arguments_of_cells_and_a_warning():
    for module in (nn, rnn):
        with pytest.warns(UserWarning, match="num_layers greater than 1"):
            module.LSTM(I, H, dropout=0.5)
        with pytest.raises(ValueError, match="(?i)gelu"):
            module.RNN(I, H, nonlinearity="gelu")
        with pytest.raises((RuntimeError, ValueError, KeyError), match="gelu"):
            module.RNNCell(I, H, nonlinearity="gelu")(torch.zeros(I))
        for cell in ("LSTMCell", "GRUCell", "RNNCell"):
            for name in ("num_layers", "bidirectional", "proj_size"):
                with pytest.raises(TypeError, match=name):
                    getattr(module, cell)(I, H, **{name: 2})


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_torchs_rnnbase_with_its_attributes(kind):
    theirs, ours = pair(kind, 2, bias=False, batch_first=True, dropout=0.25, bidirectional=True)
    assert isinstance(ours, nn.RNNBase)
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first",
                 "dropout", "bidirectional", "proj_size", "_all_weights", "_flat_weights_names"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)
    assert ours.flatten_parameters() is None
    for place in ([2], [2, "relu"])[name == "RNN"], [True]:  # by position; a bool is an int
        name = KINDS[kind][0]
        assert repr(getattr(rnn, name)(I, H, *place)) == repr(getattr(nn, name)(I, H, *place))
    for cell in ("RNNCell", "LSTMCell", "GRUCell"):
        assert isinstance(getattr(rnn, cell)(I, H), getattr(nn, cell))


WRONG = {  # an input (T, B, I) or a state (1, B, H) changed so that nobody can read it
    "0D": lambda x, h: (x[0, 0, 0], None),
    "1D": lambda x, h: (x[0, 0], None),
    "4D": lambda x, h: (x[None], None),
    "features": lambda x, h: (torch.zeros(T, B, I + 1), None),
    "no_steps": lambda x, h: (x[:0], None),
    "no_steps_unbatched": lambda x, h: (x[:0, 0], None),
    "double": lambda x, h: (x.double(), None),
    "int": lambda x, h: (x.long(), None),
    "meta": lambda x, h: (x.to("meta"), None),
    "sparse": lambda x, h: (x.to_sparse(), None),
    "list": lambda x, h: (x.tolist(), None),
    "nothing": lambda x, h: (None, None),
    "hx_rows": lambda x, h: (x, torch.cat((h, h))),
    "hx_batch": lambda x, h: (x, torch.cat((h, h), 1)),
    "hx_batch_of_one": lambda x, h: (x, h[:, :1]),
    "hx_width": lambda x, h: (x, torch.cat((h, h), 2)),
    "hx_unbatched": lambda x, h: (x, h[:, 0]),
    "hx_batched": lambda x, h: (x[:, 0], h),
    "hx_4D": lambda x, h: (x, h[None]),
    "hx_double": lambda x, h: (x, h.double()),
    "hx_bfloat16": lambda x, h: (x, h.bfloat16()),
    "hx_int": lambda x, h: (x, h.long()),
    "hx_meta": lambda x, h: (x, h.to("meta")),
    "hx_str": lambda x, h: (x, "zeros"),
    "packed_features": lambda x, h: (packed(torch.zeros(T, B, I + 1)), None),
    "packed_hx_batch_of_one": lambda x, h: (packed(x), h[:, :1]),
    "packed_hx_width": lambda x, h: (packed(x), torch.cat((h, h), 2)),
    "packed_hx_double": lambda x, h: (packed(x), h.double()),
    "packed_missing_rows": lambda x, h: (packed(x)._replace(data=x[0]), None),
    "packed_growing": lambda x, h: (PackedSequence(x.flatten(0, 1)[:6], torch.tensor([1, 2, 3])),
                                    None),
    "packed_nothing": lambda x, h: (PackedSequence(x[0, :0], torch.tensor([]).long()), None),
}


def packed(x):
    return pack_padded_sequence(x, LENGTHS, enforce_sorted=False)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj"])
def test_wrong_input_is_an_error_of_torchs_type(path, kind, wrong):
    errors = []
    for layer in pair(kind, dtype=torch.float32):
        input, hx = WRONG[wrong](torch.randn(T, B, I), torch.zeros(1, B, layer.proj_size or H))
        if isinstance(hx, torch.Tensor) and layer.mode == "LSTM":
            c = torch.zeros(*hx.shape[:-1], H, dtype=hx.dtype, device=hx.device)
            hx = (hx, c)
        errors.append(error_of(lambda: layer(input, hx)))
    assert type(errors[1]) is type(errors[0])


@pytest.mark.parametrize("wrong,message", [
    ((torch.zeros(I), None), "2D or 3D, got 1D"),
    ((torch.zeros(T, B, I + 1), None), f"Expected {I}, got {I + 1}"),
    ((torch.zeros(T, B, I).double(), None), "float64.* does not match weight dtype .*float32"),
    ((torch.zeros(T, B, I), torch.zeros(1, B, H)), "Expected hidden"),
    ((torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(2, B, H))),
     r"hidden\[1\] size \(1, 3, 5\), got \[2, 3, 5\]"),
    ((torch.zeros(T, B, I), (torch.zeros(1, B + 1, H),) * 2), r"\(1, 3, 5\), got \[1, 4, 5\]"),
])
def test_errors_name_what_was_expected(wrong, message):
    error = error_of(lambda: rnn.LSTM(I, H)(*wrong))
    assert isinstance(error, ValueError | RuntimeError)
    pytest.raises(type(error), rnn.LSTM(I, H), *wrong).match(message)


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("x,h", [((2, B, I), None), ((), None), ((B, I + 1), None),
                                 ((B, I), (1, H)), ((B, I), (B + 1, H)), ((B, I), (B, H + 1)),
                                 ((B, I), (1, B, H)), ((I,), (H + 1,)), ((B, I), (H,))], ids=str)
def test_wrong_input_of_a_cell_is_an_error_of_torchs_type(cell, x, h):
    errors = []
    for module in (nn, rnn):
        hx = None if h is None else (torch.zeros(h),) * 2
        hx = hx if cell == "LSTMCell" or h is None else hx[0]
        errors.append(error_of(lambda: getattr(module, cell)(I, H)(torch.zeros(x), hx)))
    assert type(errors[1]) is type(errors[0])


# ---- What holds for the layers by themselves ----


ALL_LAYERS = [pytest.param(getattr(rnn, cls), more, id=kind)
              for kind, (cls, more) in KINDS.items()]


@pytest.mark.parametrize("cls,more", ALL_LAYERS)
def test_splitting_a_sequence_changes_nothing(path, cls, more):
    layer = cls(I, H, 2, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    whole, end = layer(x)
    first, state = layer(x[:2])
    second, state = layer(x[2:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole, **TIGHT)
    torch.testing.assert_close(state, end, **TIGHT)


@pytest.mark.parametrize("cls,more", ALL_LAYERS)
def test_packed_equals_one_by_one(path, cls, more):
    layer = cls(I, H, 2, bidirectional=True, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    result, state = layer(packed(x))
    output, lengths = pad_packed_sequence(result)
    for b, n in enumerate(lengths):
        alone, alone_state = layer(x[:n, b])
        torch.testing.assert_close(output[:n, b], alone, **TIGHT)
        torch.testing.assert_close([s[:, b] for s in flat(state)], flat(alone_state), **TIGHT)


@pytest.mark.parametrize("cls,more", ALL_LAYERS)
@pytest.mark.parametrize("layout", ["batched", "packed_unsorted"])
def test_first_and_second_derivatives(path, cls, more, layout):
    """nn.LSTM has no second derivative on the GPU, and none through oneDNN."""
    layer = cls(2, 2, bidirectional=True, dtype=torch.float64,
                **{name: 1 if name == "proj_size" else value for name, value in more.items()})
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = dict(layer.named_parameters())

    def run(x, *values):
        input = x if layout == "batched" else pack_padded_sequence(x, [1, 3], enforce_sorted=False)
        result = torch.func.functional_call(layer, dict(zip(weights, values)), (input,))
        return tuple(flat(result))

    if more.get("nonlinearity") != "relu":  # its kinks are no place for finite differences
        assert torch.autograd.gradcheck(run, (x, *weights.values()))
        assert torch.autograd.gradgradcheck(run, (x, *weights.values()))


@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_unsorted"])
def test_trace_shows_every_state_and_gate(path, layout):
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


def test_variational_dropout_has_one_mask_per_sequence():
    """The second layer sees the same units of the first at every step, packed or not; others in
    other sequences."""
    layer = rnn.RNN(I, 50, 2, dropout=0.5, dtype=torch.float64)
    layer.variational = True
    seen = []
    layer._direction = lambda x, *rest: (seen.append(x), rnn.RNN._direction(layer, x, *rest))[1]
    x = torch.rand(T, B, I, dtype=torch.float64)
    for input, sizes in ((x, None), (packed(x), packed(x).batch_sizes.tolist())):
        seen.clear()
        layer(input)
        zero = seen[1] == 0  # (T, B, 50), or packed (N, 50)
        zero = zero.unbind() if sizes is None else zero.split(sizes)  # T x (B_t, 50)
        assert all(torch.equal(z, zero[0][:len(z)]) for z in zero)
        assert not torch.equal(zero[0][0], zero[0][1])
        kept = seen[1][seen[1] != 0].abs().max()
        assert kept <= 2 and 0.3 < zero[0].double().mean() < 0.7  # kept ones are doubled
    layer.eval()
    plain = rnn.RNN(I, 50, 2, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
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


def test_layers_make_no_warnings(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn.LSTM(I, H, 2, dropout=0.1)(torch.zeros(T, B, I))
