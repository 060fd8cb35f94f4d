"""The fused LSTM of csrc/: its operators, its derivatives, its threads, its absence."""

import io
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading

import pytest
import torch
from cells import LayerNormLSTM, PeepholeLSTM
from conftest import ROOT, build_fused, close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnn

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

# B, I, H, sizes: no H but 16 fills a vector; one sequence, one step; packed sequences. Up to 8 rows
# in all, the first ones, are computed another way.
SHAPES = [(2, 3, 5, [2, 2, 2]), (1, 2, 17, [1, 1]), (3, 1, 1, [3]), (8, 18, 37, [8]),
          (3, 35, 21, [3, 3, 1]), (13, 2, 3, [13, 13]), (4, 3, 16, [4, 3, 3, 1]),
          (5, 2, 9, [5, 5, 1, 1]), (9, 20, 37, [9, 4])]
REVERSE = [False, True]


@pytest.fixture(scope="module", autouse=True)
def built():
    build_fused()


def tensors(B, I, H, sizes, dtype=torch.float64):
    """x, h0, c0, w_ih, bias, w_hh, in the order of rnn.fused.lstm."""
    torch.manual_seed(0)
    shapes = [(sum(sizes), I), (B, H), (B, H), (4 * H, I), (4 * H,), (4 * H, H)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def on(place, tensors):
    """Copies of them, as leaves, on the place's device in its type."""
    device, dtype = place
    return [t.detach().to(device, dtype).requires_grad_() for t in tensors]


def fused(inputs, sizes, reverse):
    return rnn.fused.FusedLSTM.apply(*inputs, sizes, reverse, rnn.plain_lstm)


def plain(inputs, sizes, reverse):
    return rnn.plain_lstm(*inputs, sizes, reverse)


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_path(shape, reverse, place):
    """The plain path in float64, from the same rounded values."""
    sizes, dtype = shape[-1], place[1]
    mine = on(place, tensors(*shape))
    exact = on(("cpu", torch.float64), mine)
    ours, theirs = fused(mine, sizes, reverse), plain(exact, sizes, reverse)
    close(ours, theirs, dtype)
    for use in ([0], [1], [0, 1]):  # a gradient for h, for c, for both
        grads = [torch.autograd.grad([out[k].square().sum() for k in use], inputs,
                                     retain_graph=True, allow_unused=True)
                 for out, inputs in ((ours, mine), (theirs, exact))]
        close(*grads, dtype)


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape, reverse):
    inputs, sizes = tensors(*shape), shape[-1]
    fast = shape[2] > 5  # random directions instead of every single entry
    assert torch.autograd.gradcheck(lambda *i: fused(i, sizes, reverse), inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda *i: fused(i, sizes, reverse), inputs,
                                        fast_mode=True)


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(shape, reverse, place):
    x, h0, c0, w_ih, bias, w_hh = (t.detach() for t in on(place, tensors(*shape)))
    forward, backward = torch.ops.rnn.lstm_forward, torch.ops.rnn.lstm_backward
    for save in (False, True):
        arguments = (x, w_ih, bias, h0, c0, w_hh, shape[-1], reverse, save)
        torch.library.opcheck(forward, arguments)
    h, c, gates = forward(*arguments)
    for dc, w in ((None, w_ih), (torch.ones_like(c), None)):
        torch.library.opcheck(backward, (h, dc, gates, c, c0, w, w_hh, shape[-1], reverse))


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_keeps_no_gates_but_the_same_results(shape, reverse, place):
    (x, h0, c0, w_ih, bias, w_hh), sizes = on(place, tensors(*shape)), shape[-1]
    h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, True)
    lean = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, False)
    assert gates.shape == (len(x), 4 * len(h0[0])) and lean[2].shape == (0, 4 * len(h0[0]))
    assert torch.equal(lean[0], h)
    assert torch.equal(lean[1], rnn.fused.rows_at_the_end(c, sizes, reverse))


def test_memory_is_used_again_but_not_while_it_is_needed(cpu):
    """Gates of 32 MiB and more are kept by csrc/ when nobody needs them any more."""
    sizes = [64] * 64
    x, h0, c0, w_ih, bias, w_hh = (t.detach() for t in tensors(64, 3, 512, sizes, torch.float32))

    def gates(x):
        return torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, False, True)[2]

    first, other = gates(x), gates(-x)
    assert first.nbytes == 2**25
    copies = first.clone(), other.clone()
    for _ in range(6):  # more than are kept
        held = [gates(x), gates(-x)]
        assert len({t.data_ptr() for t in (first, other, *held)}) == 4
        assert all(torch.equal(a, b) for a, b in zip((first, other, *held), copies * 2))


def test_small_numbers_keep_their_precision(cpu):
    """bfloat16 has 8 bits, whatever the exponent. Without biases the gates' inputs are small."""
    torch.manual_seed(0)
    layer, exact = rnn.LSTM(32, 64, bias=False).bfloat16(), torch.nn.LSTM(32, 64, bias=False)
    exact.load_state_dict(layer.state_dict())
    for scale in (1e-2, 1e-4, 1e-6):
        x = (torch.randn(9, 16, 32) * scale).bfloat16()
        y, expected = layer(x)[0].double(), exact.double()(x.double())[0]
        assert (y - expected).norm() < 2**-8 * expected.norm()


def test_backward_twice_gives_the_same(place):
    inputs = on(place, tensors(3, 4, 6, [3, 3, 2]))
    h, c = fused(inputs, [3, 3, 2], False)
    loss = (h * c).sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("B,I,H,sizes", [
    (32, 7, 40, [32] * 5), (3, 64, 300, [3] * 6), (33, 5, 257, [33, 30, 7, 1]),
    (64, 9, 128, [64] * 3), (1, 64, 512, [1]), (8, 70, 257, [8]), (3, 65, 300, [3, 3, 2])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(B, I, H, sizes, dtype):
    inputs = tensors(B, I, H, sizes, dtype)
    x, h0, c0, w_ih, bias, w_hh = (t.detach() for t in inputs)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 2, 3, 16):
            torch.set_num_threads(threads)
            h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, False,
                                                     True)
            back = torch.ops.rnn.lstm_backward(h, c, gates, c, c0, None, w_hh, sizes, False)
            results.append((h, c, gates, *back))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def random_case(seed, device="cpu", dtypes=(torch.float32, torch.float64)):
    """Compare one random layer on a random input with nn.LSTM, forward and backward. nn.LSTM runs
    on the CPU; in the same type, or for a layer on a GPU in float64."""
    random = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=random))]

    def size(most):
        return int(torch.randint(1, most + 1, (), generator=random))

    B, T, I, H = size(20), size(12), size(20), draw(size(8), size(70), 16, 32, 64)
    dtype = draw(*dtypes)
    options = dict(num_layers=size(3), bias=draw(True, False), batch_first=draw(True, False),
                   bidirectional=draw(True, False))
    torch.manual_seed(seed)
    ours = rnn.LSTM(I, H, dtype=dtype, **options)
    theirs = nn.LSTM(I, H, dtype=dtype if device == "cpu" else torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    ours.to(device)
    data = torch.randn(B, T, I, dtype=dtype)
    if not options["batch_first"]:
        data = data.transpose(0, 1)  # not contiguous
    if draw(True, False, False):
        data = data[:1].expand(data.shape)  # the same memory for all
    rows = options["num_layers"] * (1 + options["bidirectional"])
    hx = torch.randn(2, rows, B, H, dtype=dtype).transpose(2, 3).contiguous().transpose(2, 3)
    packed, given = draw(True, False), draw(True, False)
    lengths = torch.randint(1, T + 1, (B,), generator=random)
    uses = draw((0, 1, 2), (0,), (1,), (2,), (0, 2))  # which results get a gradient at all
    results = []
    for layer in (theirs, ours):
        like = layer.weight_ih_l0
        x, state = (t.to(like, copy=True).requires_grad_() for t in (data, hx))
        view = x[..., :] if options["batch_first"] else x
        if packed:
            view = pack_padded_sequence(view, lengths, options["batch_first"], False)
        output, (h, c) = layer(view, tuple(state.unbind()) if given else None)
        out = [output.data if packed else output, h, c]
        loss = sum((out[k] * torch.linspace(-1, 1, out[k].numel()).to(like)
                    .view(out[k].shape)).sum() for k in uses)
        leaves = [x, *([state] if given else []), *layer.parameters()]
        results.append((out, torch.autograd.grad(loss, leaves, allow_unused=True)))
    near = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-4)
    for a, b in zip((*results[1][0], *results[1][1]), (*results[0][0], *results[0][1])):
        if b is None or a is None:  # torch says zero where a path does not exist
            assert all(t is None or not t.any() for t in (a, b))
        elif device == "cpu":
            torch.testing.assert_close(a, b, **near)
        else:
            close([a], [b], dtype, times=64)  # gradients of weights sum up to 240 rows


def test_random_configurations():
    """RNN_CASES=2000 python -m pytest tests/test_fused.py -k random   for the long version."""
    first = int(os.environ.get("RNN_FIRST_CASE", 0))
    for seed in range(first, first + int(os.environ.get("RNN_CASES", 100))):
        try:
            random_case(seed)
        except Exception as error:
            raise AssertionError(f"random_case({seed}) failed") from error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_not_a_number_and_infinity_propagate_as_in_torch(value, dtype):
    theirs, ours = nn.LSTM(3, 20, dtype=dtype), rnn.LSTM(3, 20, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, 3, dtype=dtype)
    x[1, 2, 0] = value
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_nonlinearities_over_the_whole_range():
    """One unit without weights: h = sigmoid(o) * tanh(c), so both are seen through the gates."""
    a = torch.cat((torch.linspace(-100, 100, 4001), torch.logspace(-30, 0, 301),
                   -torch.logspace(-30, 0, 301))).double()
    for dtype, eps in ((torch.float32, 6e-8), (torch.float64, 1.2e-16)):
        x = a.to(dtype)[:, None].expand(-1, 4).contiguous()  # (N, 4): a gate's input each
        n = len(x)
        zero = torch.zeros(n, 1, dtype=dtype)
        gates = torch.ops.rnn.lstm_forward(x, torch.eye(4, dtype=dtype), zero[:4, 0], zero, zero,
                                           zero[:4], [n], False, True)[2].double()
        for k, expected in ((0, x[:, 0].double().sigmoid()), (2, x[:, 0].double().tanh())):
            error = (gates[:, k] - expected).abs()  # near 0, and where tanh is, relative to it
            assert (error <= 6 * eps * expected.abs() + 1e-18).all()  # three ulps


# ---- the rest of torch ----


def small_layer():
    torch.manual_seed(0)
    return rnn.LSTM(3, 5, 2, bidirectional=True), torch.randn(4, 2, 3)


def test_torch_compile_without_graph_breaks():
    layer, x = small_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        output = run(x)[0]
        output.square().sum().backward()
        results.append([output, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*results)


def test_torch_func_takes_the_plain_path():
    layer, x = small_layer()

    def loss(x):
        return layer(x)[0].square().sum()

    expected = torch.autograd.functional.jacobian(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    batch = torch.func.vmap(torch.func.grad(loss))(torch.stack((x, x)))
    torch.testing.assert_close(batch, torch.stack((expected, expected)))
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected.sum())


def test_other_types_take_the_plain_path():
    layer, x = small_layer()
    assert not rnn.fused.can_run(x.half())
    with torch.autocast("cpu", torch.float16):
        assert not rnn.fused.can_run(x) and layer(x)[0].dtype == torch.float16
    assert layer.half()(x.half())[0].dtype == torch.float16


@pytest.fixture
def calls(monkeypatch):
    """One entry for every call of the fused LSTM: its type."""
    made, run = [], rnn.fused.lstm

    def lstm(x, *rest):
        made.append(rnn.fused.type_of(x))
        return run(x, *rest)

    monkeypatch.setattr(rnn.fused, "lstm", lstm)
    return made


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_the_layers_use_it(dtype, packed, grad, calls):
    layer, x = small_layer()  # two layers, both directions
    if packed:
        x = pack_padded_sequence(x, [2, 4], enforce_sorted=False)
    with torch.set_grad_enabled(grad):
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):
                layer(x)
        else:
            layer.to(dtype)(x.to(dtype))
    assert calls == [dtype] * 4


def test_what_it_cannot_compute_does_not_use_it(calls):
    class Own(rnn.LSTM):
        step = staticmethod(lambda gx, state, p: rnn.lstm_step(gx, state, p))

    x = torch.randn(4, 2, 3)
    rnn.LSTM(3, 5).trace(x)
    for layer in (rnn.LSTM(3, 5, proj_size=2), rnn.GRU(3, 5), rnn.RNN(3, 5), Own(3, 5),
                  PeepholeLSTM(3, 5), LayerNormLSTM(3, 5)):
        layer(x)
    assert calls == []


# ---- products of bfloat16 tiles: float32 in three parts, and bfloat16 ----

# with full and cut tiles, full and cut pairs of tiles, of rows and of units; equal steps and packed
TILES = [(16, 32, 96, [16, 16]), (17, 33, 97, [17, 17, 16, 3]), (33, 40, 130, [33, 33, 33]),
         (50, 65, 128, [50, 50, 31, 31, 1]), (64, 7, 257, [64, 64])]


@pytest.fixture(params=["amx", "avx512_bf16", "float32"])
def cpu(request, monkeypatch):
    """The most that the products may use; a CPU without it takes the next best."""
    monkeypatch.setenv("RNN_CPU", request.param)
    return request.param


def root_mean_square(tensors):
    return [float(t.detach().double().square().mean().sqrt()) for t in tensors]


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_float32_keeps_its_precision(shape, reverse, cpu):
    sizes = shape[-1]
    inputs = tensors(*shape, dtype=torch.float32)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    errors = []
    for run in (fused, plain):
        results = []
        for values, how in ((inputs, run), (exact_inputs, plain)):
            h, c = how(values, sizes, reverse)
            weight = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
            results.append([h, c, *torch.autograd.grad([(h * weight).sum() + c.sum()], values)])
        errors.append(root_mean_square([a.double() - b for a, b in zip(*results)]))
    for ours, torchs, exact in zip(*errors, root_mean_square(results[1])):
        assert ours <= 1.5 * torchs + 1e-8 * exact


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", [*SHAPES, *TILES], ids=str)
def test_bfloat16_is_exact_but_for_its_rounding(shape, reverse, cpu):
    sizes = shape[-1]
    scale = (1, 1, 1, *[shape[2] ** -0.5] * 3)  # as layers have; wilder ones magnify every rounding
    inputs = [(t.detach() * k).requires_grad_()
              for t, k in zip(tensors(*shape, dtype=torch.bfloat16), scale)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for values, how in ((inputs, fused), (exact_inputs, plain)):
        h, c = how(values, sizes, reverse)
        weight = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
        results.append([h, c, *torch.autograd.grad([(h * weight).sum() + c.sum()], values)])
    eps = 2**-8  # of one rounding; several meet in each result
    for ours, exact in zip(*results):
        assert ours.dtype == torch.bfloat16
        error, size = root_mean_square([ours.double() - exact, exact])
        assert error <= 3 * eps * size + 1e-6


@pytest.mark.parametrize("B,T,I,H", [(32, 20, 24, 64), (16, 30, 64, 128), (3, 40, 10, 33)])
def test_autocast_is_no_further_from_the_truth_than_torch(B, T, I, H, cpu):
    theirs, ours = nn.LSTM(I, H, 2), rnn.LSTM(I, H, 2)
    ours.load_state_dict(theirs.state_dict())
    exact = nn.LSTM(I, H, 2).double()
    exact.load_state_dict(theirs.state_dict())
    x, weight = torch.randn(T, B, I), torch.randn(T, B, H)
    results = []
    for layer, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64)):
        input = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=layer is not exact):
            y = layer(input)[0]
        y.backward(weight.to(y.dtype))
        results.append([y, input.grad, *(p.grad for p in layer.parameters())])
    errors = [root_mean_square([a.double() - b for a, b in zip(r, results[2])]) for r in results]
    for ours, torchs in zip(*errors[:2]):
        assert ours <= 1.1 * torchs


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("where", ["x", "h0", "c0", "w_ih", "bias", "w_hh"])
def test_infinity_goes_where_it_goes_in_torch(where, value):
    B, I, H, T = 32, 16, 96, 3
    theirs = nn.LSTM(I, H)
    x, h0, c0 = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(1, B, H)
    {"x": x[1], "h0": h0[0], "c0": c0[0], "w_ih": theirs.weight_ih_l0.data,
     "bias": theirs.bias_ih_l0.data[None], "w_hh": theirs.weight_hh_l0.data}[where][0, 5] = value
    ours = rnn.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs):
        input = x.clone().requires_grad_()
        y, state = layer(input, (h0, c0))
        y.square().sum().backward()
        results.append([y, *state, torch.isfinite(input.grad)])
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3.4e38])
def test_the_gradient_of_h0_is_no_nan_where_w_hh_is_large(value, cpu):
    """Of a single step nothing but dh0 = da W_hh meets W_hh."""
    B, H = 32, 96
    w = torch.randn(4 * H, H) / 10
    w[0, 5] = value
    dh, gates, c = torch.randn(B, H) / 100, torch.rand(B, 4 * H), torch.randn(B, H)
    da, _, dh0, _ = torch.ops.rnn.lstm_backward(dh, None, gates, c, torch.ones(B, H), None, w, [B],
                                                False)
    exact = da.double() @ w.double()
    assert not exact.isnan().any()
    torch.testing.assert_close(dh0.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_limit_of_float32_in_three_parts():
    """Below 1e-30 the parts are too small for AMX: see tiles.h. A number may lose parts that are
    below the smallest normal number, but not more."""
    B, T, H, I = 20, 30, 100, 120
    da, x, h = (torch.rand(T * B, n) + 1 for n in (4 * H, I, H))
    least = torch.finfo(torch.float32).tiny
    for scale in (1e-30, 1e-34, 1e-37):
        exact = (da * scale).double().t() @ x.double()
        dw_ih, _, _ = torch.ops.rnn.lstm_weight_gradients(da * scale, x, h, h[:B], [B] * T, False)
        bound = T * B * torch.finfo(torch.float32).eps * exact.abs()  # of float32's own sums
        assert ((dw_ih - exact).abs() <= bound + (scale < 1e-30) * T * B * 2 * 3 * least).all()


# The last one is longer than the part of the rows that is copied at a time.
@pytest.mark.parametrize("B,I,H,sizes", [
    (3, 5, 7, [3, 3, 1]), (32, 65, 130, [32] * 9 + [20] * 3), (64, 64, 200, [64] * 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", REVERSE)
def test_weight_gradients(B, I, H, sizes, dtype, reverse, cpu, monkeypatch):
    N, compute = sum(sizes), torch.ops.rnn.lstm_weight_gradients
    da, x, h, h0 = (torch.randn(n, m).to(dtype) for n, m in ((N, 4 * H), (N, I), (N, H), (B, H)))
    ours = compute(da, x, h, h0, sizes, reverse)
    exact = rnn.fused.weight_gradients(*(t.double() for t in (da, x, h, h0)), sizes, reverse)
    with monkeypatch.context() as patch:
        patch.setenv("RNN_CPU", "float32")  # so the products are torch's
        torchs = compute(da, x, h, h0, sizes, reverse)
    tiles = cpu == "amx" and dtype != torch.float64 and not all(  # so it is where there is AMX
        torch.equal(a, b) for a, b in zip(ours, torchs))
    low = dtype == torch.bfloat16
    result = torch.float32 if low else dtype
    # Rounding errors of N sums in a row; torch's own products round bfloat16 results once more.
    bound = torch.finfo(result).eps * max(1, N**0.5 / 4)
    bound += 2**-8 * (low and not tiles)
    for a, b in zip(ours, exact):
        assert a.dtype == result and (a - b).norm() <= bound * b.norm()
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            again = compute(da, x, h, h0, sizes, reverse)
        finally:
            torch.set_num_threads(before)
        if tiles:
            assert all(torch.equal(a, b) for a, b in zip(ours, again))
    torch.library.opcheck(compute, (da, x, h, h0, sizes, reverse))
    da[1, 2] = float("inf")
    for a in compute(da, x, h, h0, sizes, reverse):
        assert a[2].isinf().all() and a[3:].isfinite().all()


def test_weight_gradients_of_wrong_shapes():
    good = [torch.zeros(4, 8), torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(2, 2)]
    for k, name in enumerate(("da", "x", "h", "h0")):
        wrong = list(good)
        wrong[k] = wrong[k][:, :, None] if name in ("x", "h0") else wrong[k][:, 1:]
        with pytest.raises(RuntimeError, match=name):
            torch.ops.rnn.lstm_weight_gradients(*wrong, [2, 2], False)
    with pytest.raises(RuntimeError, match="sizes"):
        torch.ops.rnn.lstm_weight_gradients(*good, [2, 1], False)
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(RuntimeError, match="bfloat16 or, on CUDA, float16 expected, got"):
            torch.ops.rnn.lstm_weight_gradients(*(t.to(dtype) for t in good), [2, 2], False)


def test_frozen_weights_cost_no_gradients():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    layer, x = small_layer()
    x.requires_grad_()
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        seen.clear()
        with Watch():
            layer(x)[0].sum().backward()
        assert seen.count("rnn.lstm_backward.default") == 4  # two layers, both directions
        assert seen.count("rnn.lstm_weight_gradients.default") == (0 if frozen else 4)
    layer.bias_ih_l0.requires_grad_()  # any one of them
    layer(x)[0].sum().backward()
    assert layer.bias_ih_l0.grad.any()


@pytest.mark.parametrize("B", [1, 2, 3, 7, 8, 9, 40])
@pytest.mark.parametrize("I,H", [(3, 5), (65, 33), (16, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_step_by_step_as_torch(B, I, H, dtype):
    """Up to 8 sequences, and many in bfloat16, are fused in a single step; others take the plain
    path, as all do in training."""
    theirs, ours = nn.LSTM(I, H, 2).double(), rnn.LSTM(I, H, 2, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())  # rounded alike
    x = torch.randn(4, B, I, dtype=dtype)
    assert rnn.fused.pays_off(x, [B] * 4) and rnn.fused.pays_off(x, [B]) == (
        B == 40 and dtype == torch.bfloat16)
    state = exact_state = None
    with torch.no_grad():
        assert rnn.fused.pays_off(x, [B]) == (B <= 8 or B == 40 and dtype == torch.bfloat16)
        for t in range(4):
            y, state = ours(x[t : t + 1], state)
            exact, exact_state = theirs(x[t : t + 1].double(), exact_state)
            close((y, *state), (exact, *exact_state), dtype)


# ---- wrong arguments, straight to the operators ----


def operator_arguments(**changes):
    x, h0, c0, w_ih, bias, w_hh = (t.detach() for t in tensors(3, 2, 4, [3, 2]))
    good = dict(x=x, w_ih=w_ih, bias=bias, h0=h0, c0=c0, w_hh=w_hh, sizes=[3, 2], reverse=False,
                save=True)
    return good | {name: change(good[name]) for name, change in changes.items()}


@pytest.mark.parametrize("changes,message", [
    ({"x": lambda x: x[0]}, "x and h0 must have 2 dimensions, got 1"),
    ({"x": lambda x: x[:, :1]}, r"w_ih must be \[16, 1\]"),
    ({"x": lambda x: x.float()}, "x must be Double as the others, got Float"),
    ({"x": lambda x: x.to_sparse()}, "SparseCPU"),
    ({"h0": lambda x: x.float().to_mkldnn()}, "MkldnnCPU"),
    ({"w_ih": lambda w: w[1:]}, r"w_ih must be \[16, 2\], got \[15, 2\]"),
    ({"bias": lambda b: b[:4]}, r"bias must be \[16\], got \[4\]"),
    ({"bias": lambda b: b[0]}, r"bias must be \[16\], got \[\]"),
    ({"bias": lambda b: b[None]}, r"bias must be \[16\], got \[1, 16\]"),
    ({"h0": lambda h: h[:, :3]}, r"h0 must be \[3, 4\]"),
    ({"c0": lambda c: c[:2]}, r"c0 must be \[3, 4\], got \[2, 4\]"),
    ({"w_hh": lambda w: w[:8]}, r"w_hh must be \(4H, H\), got \[8, 4\]"),
    ({"w_hh": lambda w: w[:0, :0]}, r"w_hh must be \(4H, H\)"),
    ({"w_hh": lambda w: w.long()}, "bfloat16 or, on CUDA, float16 expected, got Long"),
    ({"sizes": lambda s: []}, "must begin with the number of sequences, 3"),
    ({"sizes": lambda s: [2, 3]}, "must begin with the number of sequences, 3"),
    ({"sizes": lambda s: [3, 3]}, "more than the 5 rows"),
    ({"sizes": lambda s: [3, 1]}, "add up to 4, but the input has 5 rows"),
    ({"sizes": lambda s: [3, 0, 2]}, "never grow nor be negative, got 2 after 0"),
    ({"sizes": lambda s: [3, 3, -1]}, "more than the 5 rows|never grow"),
    ({"sizes": lambda s: [3, 2**62]}, "never grow"),
])
def test_the_operators_check_what_they_get(changes, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        torch.ops.rnn.lstm_forward(*operator_arguments(**changes).values())


@pytest.mark.parametrize("changes,message", [
    ({"dh": lambda t: t[:4]}, r"dh must be \[5, 4\]"), ({"dc": lambda t: t[:, :1]}, "dc must be"),
    ({"gates": lambda t: t[:0]}, "more than the 0 rows|dh must be"),
    ({"gates": lambda t: t[0]}, "2 dimensions, got 1"),
    ({"c": lambda t: t.float()}, "c must be Double as the others, got Float"),
    ({"c0": lambda t: t[:1]}, "sizes must begin with the number of sequences, 1"),
    ({"w_ih": lambda t: t[0]}, "w_ih must have 2 dimensions, got 1"),
    ({"w_ih": lambda t: t[1:]}, r"w_ih must be \[16, 2\], got \[15, 2\]"),
    ({"sizes": lambda s: [3]}, "add up to 3, but the input has 5 rows"),
])
def test_the_backward_operator_checks_too(changes, message):
    a = operator_arguments()
    h, c, gates = torch.ops.rnn.lstm_forward(*a.values())
    good = dict(dh=h, dc=c, gates=gates, c=c, c0=a["c0"], w_ih=a["w_ih"], w_hh=a["w_hh"],
                sizes=[3, 2], reverse=False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnn.lstm_backward(*(good | {n: f(good[n]) for n, f in changes.items()}).values())


def test_tracing_checks_too():
    """torch.compile sees no numbers, only shapes."""
    a, weight_gradients = operator_arguments(), torch.ops.rnn.lstm_weight_gradients
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in a.items()}
        for name in ("x", "h0", "w_hh"):
            with pytest.raises(RuntimeError, match=f"lstm: {name} must have 2 dimensions, got 1"):
                torch.ops.rnn.lstm_forward(*(fake | {name: fake[name][0]}).values())
        half = {n: t.half() if isinstance(t, torch.Tensor) else t for n, t in fake.items()}
        with pytest.raises(RuntimeError, match="expected one of .*float32.*, got torch.float16"):
            torch.ops.rnn.lstm_forward(*half.values())
        h, c, gates = torch.ops.rnn.lstm_forward(*fake.values())
        for name, wrong in (("gates", (h, c, gates[0], c, fake["c0"], fake["w_ih"])),
                            ("c0", (h, c, gates, c, fake["c0"][0], None)),
                            ("w_ih", (h, c, gates, c, fake["c0"], fake["w_ih"][0]))):
            with pytest.raises(RuntimeError, match=f"lstm: {name} must have 2 dimensions, got 1"):
                torch.ops.rnn.lstm_backward(*wrong, fake["w_hh"], [3, 2], False)
        with pytest.raises(RuntimeError, match="lstm: h0 must have 2 dimensions, got 1"):
            weight_gradients(gates, fake["x"], h, fake["h0"][0], [3, 2], False)


def test_nothing_to_do():
    for B, sizes in ((0, [0, 0, 0]), (0, []), (2, [])):
        x, h0, c0, w_ih, bias, w_hh = tensors(B, 3, 5, sizes)
        h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, False, True)
        assert h.shape == c.shape == (0, 5) and gates.shape == (0, 20)
        for w, I in ((w_ih, 3), (None, 0)):
            back = torch.ops.rnn.lstm_backward(h, None, gates, c, c0, w, w_hh, sizes, False)
            assert [tuple(t.shape) for t in back] == [(0, 20), (0, I), (B, 5), (B, 5)]
        assert not any(t.any() for t in back)


# ---- threads and processes ----


def outputs(seed=0):
    torch.manual_seed(seed)
    layer, x = rnn.LSTM(8, 200), torch.randn(6, 3, 8)
    with torch.no_grad():
        return layer(x)[0]


def test_from_several_python_threads_at_once():
    results = [None] * 8
    layer, x = rnn.LSTM(8, 200), torch.randn(6, 3, 8)
    with torch.no_grad():
        expected = layer(x)[0]

    def work(k):
        with torch.no_grad():
            for _ in range(20):
                results[k] = layer(x)[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert all(torch.equal(r, expected) for r in results)


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return outputs(k)


def test_inside_data_loader_workers_and_after_fork():
    """The parent has used the team of threads already; torch gives each worker one thread."""
    expected = [outputs(k) for k in range(4)]
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(Items(), batch_size=None, num_workers=2,
                                             multiprocessing_context=context, timeout=100)
        # A spawned worker that finds no rnn_C takes the plain path: equal but for rounding.
        torch.testing.assert_close(list(loader), expected)


def _child(queue):
    torch.set_num_threads(1)  # as torch's own documentation asks for after fork
    queue.put(outputs().sum().item())


def test_after_a_plain_fork():
    expected = outputs().sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-5)
    process.join(60)


def test_no_memory_is_an_error_and_not_the_end():
    """An exception inside a team of threads would end the process. All blocks of memory of 16 KiB
    and more are taken, so that the products' own, of 32 KiB, find none."""
    done = python("""
        import ctypes, resource, torch, rnn
        rnn.build()
        data = [torch.zeros(2, n, dtype=torch.bfloat16) for n in (32, 3, 8, 8)]
        run = torch.ops.rnn.lstm_weight_gradients
        run(*data, [2], False)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        malloc = ctypes.CDLL(None).malloc
        malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        while malloc(1 << 14):
            pass
        try:
            run(*data, [2], False)
            print("done")
        except RuntimeError as error:
            print("refused" if "can't allocate memory" in str(error) else error)
    """, ROOT, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and done.stdout.strip() in ("done", "refused"), done.stderr


# ---- built, not built, built for something else ----


def python(code, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=300)


USE = "import rnn, torch; rnn.LSTM(2, 3)(torch.zeros(4, 1, 2)); print(rnn.fused is not None)"


def test_the_environment_decides(tmp_path):
    hidden = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    (tmp_path / "rnn_C.py").write_text("raise ModuleNotFoundError('pretends to be absent')")
    assert "True" not in python(USE, tmp_path, RNN_FUSED="0").stdout
    loud = python(USE, tmp_path, RNN_FUSED="1", **hidden)
    assert loud.returncode and "RNN_FUSED=1, but the fused LSTM is not built" in loud.stderr
    nonsense = python(USE, tmp_path, RNN_FUSED="yes")
    assert "RNN_FUSED must be 0, 1 or unset, got 'yes'" in nonsense.stderr
    nonsense = python("import rnn; rnn.build()", tmp_path, RNN_CPU="amx512", **hidden)
    assert nonsense.returncode and nonsense.stderr.strip().endswith(
        "RNN_CPU must be float32, avx512_bf16, amx or unset, got 'amx512'")
    forbidden = python("import rnn; rnn.build()", tmp_path, RNN_FUSED="0")
    assert "RNN_FUSED=0 in the environment forbids" in forbidden.stderr


def test_a_library_that_does_not_load_is_one_warning(tmp_path):
    """One of another torch is not even tried."""
    (tmp_path / "rnn_C").mkdir()
    (tmp_path / "rnn_C" / "__init__.py").write_text((ROOT / "csrc" / "__init__.py").read_text())
    for name, content, words in (
            ("native_1_0_0_12345678.py", b"raise SystemExit('must not be loaded')",
             f"for this torch, {torch.__version__}, and this CPU it would be rnn_C.native_"),
            (rnn.fused.library() + ".py", b"raise ImportError('undefined symbol')",
             "undefined symbol"),
            (rnn.fused.library() + sysconfig.get_config_var("EXT_SUFFIX"), b"\x7fELF damaged",
             "native_")):
        (tmp_path / "rnn_C" / name).write_bytes(content)
        done = python(USE, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", RNN_FUSED="")
        assert done.returncode == 0 and done.stdout == "False\n"
        assert done.stderr.count("so LSTM runs its plain path") == 1
        assert words in done.stderr


def loaded_library():
    """The file that this process has loaded."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if rnn.fused.library() in line)


def test_every_cpu_and_every_torch_has_its_own_library(monkeypatch):
    names = [rnn.fused.library()]
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    names.append(rnn.fused.library())
    for cpu in ("flags\t\t: fpu avx2 avx512f\n", "flags\t\t: fpu avx2\n", ""):
        monkeypatch.setattr(rnn.fused, "open", lambda _, cpu=cpu: io.StringIO(f"processor\n{cpu}"),
                            raising=False)
        names.append(rnn.fused.library())
    assert len(set(names)) == len(names) and all(re.fullmatch(r"native_\w+", n) for n in names)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the library in /proc")
def test_a_library_that_does_not_fit_does_not_hinder_a_build(tmp_path):
    """It must not even be loaded, for it registers the operators."""
    (tmp_path / "rnn_C").mkdir()
    shutil.copy(ROOT / "csrc" / "__init__.py", tmp_path / "rnn_C")
    shutil.copy(loaded_library(), tmp_path / "rnn_C" / "native_1_0_0_12345678.so")
    done = python("import rnn; print(rnn.fused); rnn.build();" + USE, tmp_path,
                  PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", RNN_FUSED="")
    assert done.returncode == 0 and done.stdout == "None\nTrue\n", done.stderr
    assert done.stderr.count("rnn_C does not fit this Python, torch or CPU") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the library in /proc")
def test_two_libraries_in_one_process_are_an_error_and_not_its_end(tmp_path):
    (tmp_path / "rnn_C.py").write_text("raise ModuleNotFoundError('pretends to be absent')")
    shutil.copy(loaded_library(), tmp_path / "other.so")
    done = python("import torch, rnn; torch.ops.load_library('other.so'); rnn.build()", tmp_path,
                  PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1 and done.stderr.strip().endswith(
        "the operators of another build are loaded already: restart Python")


@pytest.mark.skipif("RNN_BUILDS" not in os.environ, reason="takes minutes: RNN_BUILDS=1")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="has no other instruction sets")
def test_a_library_for_another_cpu_says_so(tmp_path):
    """It pretends that this CPU has nothing, and is asked twice."""
    shutil.copy(ROOT / "rnn.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name, old, new in (("lstm.cpp", "__builtin_cpu_supports(feature)", "false"),
                           ("__init__.py", '"lstm.cpp", "lstm_cpu.cpp", "lstm_bf16.cpp", '
                            '"gradients.cpp"', '"lstm.cpp"')):
        source = (tmp_path / "csrc" / name).read_text()
        assert source.count(old) == 1
        (tmp_path / "csrc" / name).write_text(source.replace(old, new))
    (tmp_path / "rnn_C.py").write_text("raise ModuleNotFoundError('pretends to be absent')")
    done = python("""
        import rnn
        for _ in range(2):
            try:
                rnn.build()
            except RuntimeError as error:
                print(str(error).splitlines()[0])
    """, tmp_path, PYTHONPATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    first, second = done.stdout.splitlines()
    assert "compiled for a CPU with" in first, done.stderr
    assert second.endswith("the operators of another build are loaded already: restart Python")


def test_reload_keeps_the_operators(tmp_path):
    done = python("import importlib, rnn; rnn.build(); before = rnn.fused; importlib.reload(rnn);"
                  "assert rnn.fused is before;" + USE, tmp_path)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def test_a_build_that_was_killed_leaves_no_lock_and_the_next_does_not_wait(tmp_path, monkeypatch):
    """torch marks a folder where it builds with a file, and waits for ever if it stays."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built, native = [], rnn.fused
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: False)

    def load(name, *arguments, build_directory, **options):
        assert name == f"rnn_C_{native.library()}"
        assert not os.path.exists(os.path.join(build_directory, "lock"))
        open(os.path.join(build_directory, "lock"), "w").close()
        built.append(build_directory)

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(native, "_register_shapes", lambda: None)
    for _ in range(2):
        native.compile_and_load()
    assert len(built) == 2 and built[0] == built[1] and built[0].startswith(str(tmp_path))


@pytest.mark.skipif("RNN_BUILDS" not in os.environ, reason="takes minutes: RNN_BUILDS=1")
def test_builds_that_are_killed_and_that_run_at_once(tmp_path):
    """From an empty cache: kill a build in its middle, then let two processes build together."""
    (tmp_path / "rnn_C.py").write_text("raise ModuleNotFoundError('pretends to be absent')")
    settings = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
                "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import rnn; rnn.build(); " + USE]
    first = subprocess.Popen(command, env=settings, cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(20)
    first.kill()
    first.wait()
    assert list((tmp_path / "cache").glob("*/lock"))
    both = [subprocess.Popen(command, env=settings, cwd=tmp_path, stdout=subprocess.PIPE)
            for _ in range(2)]
    assert [process.communicate(timeout=1200)[0] for process in both] == [b"True\n"] * 2


@pytest.mark.parametrize("missing", ["compiler", "c++ in PATH", "ninja", "csrc", "cache"])
def test_build_without_its_tools_says_so(tmp_path, missing):
    """And train_shakespeare.py goes on without: see test_script.py."""
    folder, settings = ROOT, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    (tmp_path / "rnn_C.py").write_text("raise ModuleNotFoundError('pretends to be absent')")
    if missing == "compiler":
        settings["CXX"] = "/nowhere/c++"
    if missing == "c++ in PATH":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ninja").symlink_to(shutil.which("ninja"))
        settings["PATH"] = str(tmp_path / "bin")
    if missing == "cache":
        settings["TORCH_EXTENSIONS_DIR"] = "/dev/null/cache"
    if missing == "ninja":
        settings["PATH"] = "/nowhere"
    if missing == "csrc":
        folder = tmp_path / "copy"
        folder.mkdir()
        (folder / "rnn.py").write_text((ROOT / "rnn.py").read_text())
    settings["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{folder}"
    done = python("import rnn; rnn.build()", tmp_path, **settings)
    assert done.returncode == 1
    assert "RuntimeError: the fused LSTM could not be built: " in done.stderr
