"""The fused LSTM of csrc/: what its operators compute, with every kernel that this CPU has.

The oracles are rnn.py's plain path in float64 and torch.nn.LSTM. How the operators behave inside
torch is in test_fused_torch.py, how they are built and chosen in test_fused_build.py.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import build_fused, close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn

# B, I, H, sizes: no H but 16 fills a vector; one sequence, one step; packed sequences. Up to 8 rows
# in all, the first ones, may be computed another way, and so may up to 2 sequences.
SHAPES = [(2, 3, 5, [2, 2, 2]), (1, 2, 17, [1, 1]), (3, 1, 1, [3]), (8, 18, 37, [8]),
          (3, 35, 21, [3, 3, 1]), (13, 2, 3, [13, 13]), (4, 3, 16, [4, 3, 3, 1]),
          (5, 2, 9, [5, 5, 1, 1]), (9, 20, 37, [9, 4]), (2, 34, 3, [2, 2, 2, 2, 1])]
# With full and cut tiles, full and cut pairs of tiles, of rows and of units; equal steps and packed
TILES = [(16, 32, 96, [16, 16]), (17, 33, 97, [17, 17, 16, 3]), (33, 40, 130, [33, 33, 33]),
         (50, 65, 128, [50, 50, 31, 31, 1]), (64, 7, 257, [64, 64])]
REVERSE = [False, True]


def kernels(*names):
    """Run a test with each of these kernels that this CPU has."""
    return pytest.mark.parametrize("kernel", names, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def built():
    build_fused()


def tensors(B, I, H, sizes, dtype=torch.float64):
    """x, h0, c0, w_ih, bias, w_hh."""
    torch.manual_seed(0)
    shapes = [(sum(sizes), I), (B, H), (B, H), (4 * H, I), (4 * H,), (4 * H, H)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def on(place, tensors):
    """Copies of them, as leaves, on the place's device in its type."""
    device, dtype = place
    return [t.detach().to(device, dtype).requires_grad_() for t in tensors]


def plain_lstm(x, h0, c0, w_ih, bias, w_hh, sizes, reverse):
    """The plain path: h and c (N, H) of every row's step."""
    rows = F.linear(x, w_ih, bias).split(sizes)  # T times (B_t, 4H)
    computed, _ = rnn.scan(rnn.lstm_step, rows, (h0, c0), rnn.Parameters(weight_hh=w_hh), reverse,
                           keep=True)
    return torch.cat(computed["h"]), torch.cat(computed["c"])


def plain(inputs, sizes, reverse):
    return plain_lstm(*inputs, sizes, reverse)


def fused(inputs, sizes, reverse):
    return rnn.fused.FusedLSTM.apply(*inputs, sizes, reverse, plain_lstm)


def root_mean_square(tensors):
    return [float(t.detach().double().square().mean().sqrt()) for t in tensors]


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


@kernels("simple", "vector")
@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", [(2, 2, 3, [2, 2]), SHAPES[4], SHAPES[6]], ids=str)
def test_gradcheck(shape, reverse, kernel):
    inputs, sizes = tensors(*shape), shape[-1]
    fast = shape[2] > 5  # random directions instead of every single entry
    assert torch.autograd.gradcheck(lambda *i: fused(i, sizes, reverse), inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda *i: fused(i, sizes, reverse), inputs,
                                        fast_mode=True)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6]], ids=str)
def test_opcheck(shape, place):
    x, h0, c0, w_ih, bias, w_hh = (t.detach() for t in on(place, tensors(*shape)))
    forward, backward = torch.ops.rnn.lstm_forward, torch.ops.rnn.lstm_backward
    for save in (False, True):
        arguments = (x, w_ih, bias, h0, c0, w_hh, shape[-1], False, save)
        torch.library.opcheck(forward, arguments)
    h, c, gates = forward(*arguments)
    if place[0] == "cpu":
        torch.library.opcheck(torch.ops.rnn.lstm_weight_gradients,
                              (gates, x, h, h0, shape[-1], False))
    for dc, w in ((None, w_ih), (torch.ones_like(c), None)):
        torch.library.opcheck(backward, (h, dc, gates, c, c0, w, w_hh, shape[-1], False))


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_keeps_no_gates_but_the_same_results(shape, reverse, place):
    (x, h0, c0, w_ih, bias, w_hh), sizes = on(place, tensors(*shape)), shape[-1]
    h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, True)
    lean = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, False)
    assert gates.shape == (len(x), 4 * len(h0[0])) and lean[2].shape == (0, 4 * len(h0[0]))
    assert torch.equal(lean[0], h)
    assert torch.equal(lean[1], rnn.fused.rows_at_the_end(c, sizes, reverse))


def test_memory_is_used_again_but_not_while_it_is_needed():
    """Tensors of 1 MiB and more are kept by csrc/ when nobody needs them any more."""
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
    held[0].resize_(2 * len(x), 2048)  # as any tensor can
    assert torch.equal(held[0][: len(x)], first)


def test_backward_twice_gives_the_same(place):
    inputs = on(place, tensors(3, 4, 6, [3, 3, 2]))
    h, c = fused(inputs, [3, 3, 2], False)
    loss = (h * c).sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("B,I,H,sizes", [
    (32, 7, 40, [32] * 5), (3, 64, 300, [3] * 6), (33, 5, 257, [33, 30, 7, 1]),
    (64, 9, 128, [64] * 3), (1, 64, 512, [1]), (8, 70, 257, [8]), (3, 65, 300, [3, 3, 2]),
    (2, 70, 300, [2] * 6 + [1] * 3)], ids=str)
@pytest.mark.parametrize("kernel,dtype", [
    ("vector", torch.float32), ("vector", torch.float64), ("vector", torch.bfloat16),
    ("avx512_bf16", torch.bfloat16), ("amx", torch.float32), ("amx", torch.bfloat16)],
    ids=str, indirect=["kernel"])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(B, I, H, sizes, dtype, kernel):
    """Not `simple`: its products are torch's."""
    inputs = tensors(B, I, H, sizes, dtype)
    x, h0, c0, w_ih, bias, w_hh = (t.detach() for t in inputs)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 2, 3, 16):
            torch.set_num_threads(threads)
            h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, False,
                                                     True)
            back = torch.ops.rnn.lstm_backward(h, c, gates, c, c0, w_ih, w_hh, sizes, False)
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


@kernels("simple", "vector")
def test_nonlinearities_over_the_whole_range(kernel):
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


@kernels("simple", "vector")
def test_nothing_to_do(kernel):
    for B, sizes in ((0, [0, 0, 0]), (0, []), (2, [])):
        x, h0, c0, w_ih, bias, w_hh = tensors(B, 3, 5, sizes)
        h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, False, True)
        assert h.shape == c.shape == (0, 5) and gates.shape == (0, 20)
        for w, I in ((w_ih, 3), (None, 0)):
            back = torch.ops.rnn.lstm_backward(h, None, gates, c, c0, w, w_hh, sizes, False)
            assert [tuple(t.shape) for t in back] == [(0, 20), (0, I), (B, 5), (B, 5)]
        assert not any(t.any() for t in back)


@pytest.mark.parametrize("B", [1, 3, 8, 9, 40])
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


# ---- precision: float32, and bfloat16 with its 8 bits ----


@kernels("simple", "vector", "amx")
@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_float32_keeps_its_precision(shape, reverse, kernel):
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


@kernels("vector", "avx512_bf16", "amx")
@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("shape", [*SHAPES, *TILES, (1, 70, 150, [1] * 10)], ids=str)
def test_bfloat16_is_exact_but_for_its_rounding(shape, reverse, kernel):
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


@kernels("simple", "vector", "avx512_bf16", "amx")
def test_small_numbers_keep_their_precision(kernel):
    """bfloat16 has 8 bits, whatever the exponent. Without biases the gates' inputs are small."""
    torch.manual_seed(0)
    layer, exact = rnn.LSTM(32, 64, bias=False).bfloat16(), torch.nn.LSTM(32, 64, bias=False)
    exact.load_state_dict(layer.state_dict())
    for scale in (1e-2, 1e-4, 1e-6):
        x = (torch.randn(9, 16, 32) * scale).bfloat16()
        y, expected = layer(x)[0].double(), exact.double()(x.double())[0]
        assert (y - expected).norm() < 2**-8 * expected.norm()


@kernels("simple", "vector", "avx512_bf16", "amx")
@pytest.mark.parametrize("B,T,I,H", [(32, 20, 24, 64), (16, 30, 64, 128), (3, 40, 10, 33)])
def test_autocast_is_no_further_from_the_truth_than_torch(B, T, I, H, kernel):
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


@kernels("vector", "amx")
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3.4e38])
def test_the_gradient_of_h0_is_no_nan_where_w_hh_is_large(value, kernel):
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


@kernels("vector", "amx")
def test_the_limit_of_float32_in_three_parts(kernel):
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
@pytest.mark.parametrize("kernel,dtype", [
    ("simple", torch.float64), ("simple", torch.bfloat16), ("vector", torch.float32),
    ("vector", torch.float64), ("vector", torch.bfloat16), ("avx512_bf16", torch.bfloat16),
    ("amx", torch.float32), ("amx", torch.bfloat16)], ids=str, indirect=["kernel"])
@pytest.mark.parametrize("reverse", REVERSE)
def test_weight_gradients(B, I, H, sizes, kernel, dtype, reverse):
    N, compute = sum(sizes), torch.ops.rnn.lstm_weight_gradients
    da, x, h, h0 = (torch.randn(n, m).to(dtype) for n, m in ((N, 4 * H), (N, I), (N, H), (B, H)))
    ours = compute(da, x, h, h0, sizes, reverse)
    exact = rnn.fused.weight_gradients(*(t.double() for t in (da, x, h, h0)), sizes, reverse)
    low = dtype == torch.bfloat16
    result = torch.float32 if low else dtype
    # Rounding errors of N sums in a row; torch's own products round bfloat16 results once more.
    bound = torch.finfo(result).eps * max(1, N**0.5 / 4)
    bound += 2**-8 * (low and kernel in ("vector", "avx512_bf16"))
    for a, b in zip(ours, exact):
        assert a.dtype == result and (a - b).norm() <= bound * b.norm()
    da[1, 2] = float("inf")
    for a in compute(da, x, h, h0, sizes, reverse):
        assert a[2].isinf().all() and a[3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kernels("amx")
def test_weight_gradients_are_the_same_bits_for_any_number_of_threads(kernel, dtype):
    B, I, H, T = 64, 64, 200, 70  # large enough for tiles; others are torch's products
    inputs = [torch.randn(n, m).to(dtype) for n, m in ((T * B, 4 * H), (T * B, I), (T * B, H),
                                                       (B, H))]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.rnn.lstm_weight_gradients(*inputs, [B] * T, False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
