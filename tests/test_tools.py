"""The layers under torch's tools: copies, parametrizations, torch.func, compile, autocast."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from conftest import KINDS
from test_layers import LENGTHS, TIGHT, B, H, I, T, error_of, flat, inputs, packed, pair, state_for
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnn

DOUBLE = torch.float64


def both(kind, use, dtype=DOUBLE):
    """What `use` makes of torch's layer and of ours: the same tensors."""
    theirs, ours = pair(kind, 2, dtype=dtype, bidirectional=True)
    a, b = flat(use(theirs)), flat(use(ours))
    torch.testing.assert_close(b, a, **TIGHT)


# ---- Copies, other types and places ----


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_moves(path, kind):
    _, layer = pair(kind, 2, bidirectional=True)
    x, _ = inputs("batched", False)
    expected = layer(x)[0]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)),
                  torch.load(buffer, weights_only=False), layer.share_memory(),
                  nn.DataParallel(layer), replica(layer)):
        assert torch.equal(other(x)[0], expected)
    assert layer.to(torch.float32)(x.float())[0].dtype == torch.float32
    layer.weight_ih_l0 = nn.Parameter(torch.zeros_like(layer.weight_ih_l0))
    assert not torch.allclose(layer(x.float())[0], expected.float())  # the new weights are used


def replica(layer):
    """What DataParallel makes on every GPU: tensors that depend on the layer's parameters."""
    made = layer._replicate_for_data_parallel()
    for name, p in layer.named_parameters():
        setattr(made, name, p * 1)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_layers(path, kind, dtype):
    _, layer = pair(kind, 2)
    x, _ = inputs("batched", False)
    low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert {t.dtype for t in flat(low)} == {dtype}
    # Rounding 6 steps and 2 layers costs a few units in the last of 8 or 11 bits.
    torch.testing.assert_close(low[0].double(), layer(x)[0], rtol=0,
                               atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_on_the_meta_device(path, kind, layout):
    theirs, ours = pair(kind, 2, bidirectional=True, device="meta")
    input, _ = inputs(layout, False)
    input = (input._replace(data=input.data.to("meta")) if layout.startswith("packed")
             else input.to("meta"))
    for hx in (None, rnn.map_state(lambda s: s.to("meta"), state_for(ours, layout))):
        shapes = [[(t.shape, t.device) for t in flat(layer(input, hx))] for layer in (theirs, ours)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_meta_layer_gets_its_weights(path, kind):
    theirs, _ = pair(kind)
    name, more = KINDS[kind]
    ours = getattr(rnn, name)(I, H, device="meta", **more)  # float32
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x, _ = inputs("batched", False)
    torch.testing.assert_close(flat(ours(x)), flat(theirs(x)), **TIGHT)
    empty = getattr(rnn, name)(I, H, device="meta", **more).to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(x.float())[0].isfinite().all()


# ---- Weights computed from others ----


def weight_norm(layer):
    for name in ("weight_hh_l0", "weight_ih_l1"):
        parametrizations.weight_norm(layer, name)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, "weight_hh_l0")


def pruned(layer):
    prune.l1_unstructured(layer, "weight_hh_l0", 0.5)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def orthogonal(layer):
    parametrizations.orthogonal(layer, "weight_hh_l0")


def halved(layer):
    parametrize.register_parametrization(layer, "weight_ih_l0_reverse", Half())


@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, pruned, orthogonal, halved])
@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_layers_equal_torchs(path, kind, change):
    x, _ = inputs("batched", False)

    def use(layer):
        torch.manual_seed(3)
        change(layer)
        again = copy.deepcopy(layer)(x) if parametrize.is_parametrized(layer) else ()
        result = layer(x)
        flat(result)[0].sum().backward()
        return result, again, [p.grad for p in layer.parameters()]

    both(kind, use)


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_parametrized_cells_equal_torchs(cell):
    x, results = torch.randn(B, I, dtype=DOUBLE), []
    for module in (nn, rnn):
        torch.manual_seed(7)
        layer = getattr(module, cell)(I, H, dtype=DOUBLE)
        parametrizations.weight_norm(layer, "weight_hh")
        prune.l1_unstructured(layer, "weight_ih", 0.5)
        result = layer(x)
        flat(result)[0].sum().backward()
        results.append(flat((result, [p.grad for p in layer.parameters()])))
    torch.testing.assert_close(results[1], results[0], **TIGHT)


def test_initialize_reaches_the_effective_weight_or_raises():
    for change in (weight_norm, old_weight_norm, pruned):
        layer = rnn.LSTM(I, H, 2)
        change(layer)
        with pytest.raises(ValueError, match="weight_"):
            rnn.initialize(layer)
    model = nn.Sequential(nn.Linear(I, H), parametrizations.weight_norm(nn.Linear(I, H)))
    with pytest.raises(ValueError, match="weight"):
        rnn.initialize(model)


# ---- torch.func ----


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(path, kind):
    x, _ = inputs("batched", False)

    def use(layer):
        doubled = {name: 2 * p for name, p in layer.named_parameters()}
        call = torch.func.functional_call(layer, doubled, (x,))
        by_parameter = torch.func.grad(lambda p: torch.func.functional_call(
            layer, p, (x,))[0].sum())(doubled)
        return call, tuple(by_parameter.values()), layer(x)  # its own weights are back

    both(kind, use)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_in_another_type(kind):
    x, _ = inputs("batched", False)
    both(kind, lambda layer: torch.func.functional_call(
        layer.float(), {name: p.double() for name, p in layer.named_parameters()}, (x,)))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_that_torchs_layers_lack(path, kind):
    """vmap over sequences is the batch; jvp is the product with the Jacobian matrix of jacrev."""
    _, layer = pair(kind, 2)
    x, dx = torch.randn(2, T, B, I, dtype=DOUBLE).unbind()
    torch.testing.assert_close(torch.func.vmap(lambda s: layer(s)[0], 1, 1)(x), layer(x)[0],
                               **TIGHT)
    _, along = torch.func.jvp(lambda x: layer(x)[0], (x,), (dx,))
    matrix = torch.func.jacrev(lambda x: layer(x)[0])(x)  # (T, B, H or P, T, B, I)
    torch.testing.assert_close(along, (matrix * dx).sum((3, 4, 5)), **TIGHT)


# ---- compile and export ----


@pytest.mark.parametrize("kind,layout", [*((kind, "batched") for kind in KINDS),
                                         ("gru", "unbatched"), ("lstm", "unbatched")])
def test_compile_in_one_graph(path, kind, layout):
    _, layer = pair(kind, bidirectional=True)
    x = inputs(layout, False)[0][:3]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        result = run(x)
        results.append([*flat(result), *torch.autograd.grad(result[0].sum(), layer.parameters())])
    torch.testing.assert_close(results[1], results[0], **TIGHT)


def test_compile_packed(path):
    """Not in one graph: what the sizes are shows only when it runs."""
    layer, x = rnn.LSTM(I, H, dtype=DOUBLE), inputs("packed_unsorted", False)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(flat(compiled(x)), flat(layer(x)), **TIGHT)


def test_compile_a_character_model_and_a_cell(path, vocab, ids):
    model = rnn.CharLM(len(vocab), 8, 12, 2).double()
    cell, x = rnn.LSTMCell(I, H, dtype=DOUBLE), torch.randn(B, I, dtype=DOUBLE)
    for module, input in ((model, ids[:12].view(3, 4)), (cell, x)):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(input)), flat(module(input)), **TIGHT)


@pytest.mark.parametrize("kind,batch_first", [*((kind, False) for kind in KINDS), ("lstm", True)])
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch's own layers give it too
def test_export_with_a_batch_of_any_size(path, kind, batch_first):
    _, layer = pair(kind, 2, bidirectional=kind == "lstm", batch_first=batch_first)
    dim = 0 if batch_first else 1
    exported = exported_with_any_batch(layer, torch.randn(3, 3, I, dtype=DOUBLE), dim)
    for batch in (1, 7):
        x = torch.randn(*((batch, 3) if batch_first else (3, batch)), I, dtype=DOUBLE)
        torch.testing.assert_close(flat(exported(x)), flat(layer(x)), **TIGHT)


def exported_with_any_batch(module, input, dim):
    shapes = ({dim: torch.export.Dim("batch")},)
    program = torch.export.export(module, (input,), dynamic_shapes=shapes)
    assert not any("rnn." in str(node.target) for node in program.graph.nodes)  # runs anywhere
    return program.module()


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_export_a_character_model(path, vocab, ids):
    model = rnn.CharLM(len(vocab), 8, 12, 2).double().eval()
    exported = exported_with_any_batch(model, ids[:12].view(3, 4), 0)
    x = ids[:20].view(5, 4)
    torch.testing.assert_close(flat(exported(x)), flat(model(x)), **TIGHT)


# ---- autocast ----

LAYOUTS = {"dense": lambda x: x, "unbatched": lambda x: x[:, 0], "one_step": lambda x: x[:1],
           "packed": packed, "packed_equal": lambda x: pack_padded_sequence(x, [T] * B)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_types_under_autocast_are_torchs(path, kind, low, layout):
    """With every type of input, state and weights that torch.nn takes on this machine."""
    if (kind, low) == ("lstm", torch.float16):
        pytest.skip("oneDNN has no training in float16; what torch does then depends on the input")
    made, taken = pair(kind, 2, torch.float32, bidirectional=True), 0
    for weights, dtype, given in [*itertools.product([torch.float32], [torch.float32, low],
                                                     [None, torch.float32, low]),
                                  (low, low, None), (low, torch.float32, torch.float32)]:
        input = LAYOUTS[layout](inputs("batched", False)[0].to(dtype))
        hx = None if given is None else rnn.map_state(
            lambda s: s.to(given),
            state_for(made[0], "unbatched" if layout == "unbatched" else "batched"))
        results = []
        for layer in made:
            with torch.autocast("cpu", low):
                try:
                    results.append(flat(layer.to(weights)(input, hx)))
                except RuntimeError:  # oneDNN lacks some of them on some CPUs
                    assert layer is made[0]
                    break
        else:
            taken += 1
            theirs, ours = ([t.dtype for t in result] for result in results)
            if kind == "lstm" and (path == "plain" or layout == "one_step"):
                # One step runs the plain path, too. It may keep float32 where torch.nn rounds.
                theirs = [b if b == torch.float32 else a for a, b in zip(theirs, ours)]
            assert ours == theirs, (weights, dtype, given)
            for a, b in zip(*results):  # of at most 1; low types have 3 digits
                torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.03)
    assert taken or kind == "lstm"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_float64_to_torchs_error(path, kind, layout):
    """Neither path may round it in silence, as float32 weights cannot read it."""
    for layer in pair(kind, dtype=torch.float32):
        input = LAYOUTS[layout](torch.randn(T, B, I, dtype=DOUBLE))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            layer(input)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_types_of_cells_under_autocast_are_torchs(cell, low):
    for shape in ((), (B,)):
        for dtype in (torch.float32, low):
            for given in (None, torch.float32, low):
                results = []
                for module in (nn, rnn):
                    torch.manual_seed(7)
                    layer = getattr(module, cell)(I, H)
                    x = torch.randn(*shape, I).to(dtype)
                    h = None if given is None else torch.randn(*shape, H).to(given)
                    with torch.autocast("cpu", low):
                        results.append(flat(layer(x, (h, h) if h is not None
                                                  and cell == "LSTMCell" else h)))
                theirs, ours = ([t.dtype for t in result] for result in results)
                assert ours == theirs, (shape, dtype, given)
                for a, b in zip(*results):
                    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("packing", [False, True], ids=["dense", "packed"])
def test_gradients_under_autocast_keep_the_weights_type(path, packing):
    layer, x = rnn.LSTM(I, H, 2), torch.randn(T, B, I, requires_grad=True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(packed(x) if packing else x)[0]
        output = output.data if packing else output
        grads.append(torch.autograd.grad(output.float().sum(), [x, *layer.parameters()]))
    assert all(g.dtype == torch.float32 for g in grads[1])
    for a, b in zip(*grads):  # 8 bits
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(a.abs().max()))


def test_one_error_for_another_type_of_state(path):
    """A cell state of another type than h, at one step and at more."""
    layer, h = rnn.LSTM(I, H), torch.zeros(1, B, H)
    for steps in (2, T):
        assert type(error_of(lambda: layer(torch.randn(steps, B, I), (h, h.double())))) \
            is RuntimeError
    assert LENGTHS[0] == T
