"""The operators of csrc/ attacked directly: an exception or the right answer, never a crash.

Every attack is a random call, with a random one of the kernels that this CPU has. Often all is as
it should be, but with strange strides, values, sizes and modes: then the result must be that of the
equations in float64. Or some argument does not fit: then an exception must say so. The long
version, and under the sanitizers:

    RNN_ATTACKS=20000 python -m pytest -q tests/stress/test_attack.py    tests/stress/sanitize.sh
"""

import math
import os
import random

import pytest
import torch
from conftest import PLACES, build_fused, close
from torch._subclasses.fake_tensor import FakeTensorMode

import rnn

ATTACKS = int(os.environ.get("RNN_ATTACKS", 600))  # of each operator
FIRST = int(os.environ.get("RNN_FIRST_ATTACK", 0))
TYPES = (torch.float32, torch.float64, torch.bfloat16)
ON_CPU = [(kernel, dtype) for kernel, device, dtype in PLACES if device == "cpu"]
REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


@pytest.fixture(scope="module", autouse=True)
def built():
    build_fused()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.ops.rnn.use_kernel(rnn.KERNEL)


# ---- What is right: the equations of csrc/lstm.h in float64 ----


def product(a, b):
    """a b^T for small ones. (BLAS spreads infinity to columns that have none.)"""
    return (a[:, None] * b).sum(-1)


def walk(sizes, reverse):
    """The rows of every step, in walking order."""
    steps = torch.arange(sum(sizes)).split(sizes) if sizes else ()
    return steps[::-1] if reverse else steps


def forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, save, tiny=1e-40):
    """tiny: the fast kernels' sigmoid of -infinity, which times infinity is not NaN."""
    h, c = h0.clone(), c0.clone()
    all_h, all_c, gates = (x.new_zeros(len(x), k * h.shape[1]) for k in (1, 1, 4))
    for at in walk(sizes, reverse):
        n = len(at)
        i, f, g, o = (bias + product(x[at], w_ih) + product(h[:n], w_hh)).chunk(4, dim=1)
        i, f, g, o = i.sigmoid() + tiny, f.sigmoid() + tiny, g.tanh(), o.sigmoid() + tiny
        c[:n] = f * c[:n] + i * g
        h[:n] = o * c[:n].tanh()
        all_h[at], all_c[at], gates[at] = h[:n], c[:n], torch.cat((i, f, g, o), dim=1)
    return (all_h, all_c, gates) if save else (all_h, c, gates[:0])


def backward(dh, dc, gates, c, c0, w_ih, w_hh, sizes, reverse):
    befores, now, steps = [], c0.clone(), walk(sizes, reverse)
    for at in steps:
        befores.append(now[: len(at)].clone())
        now[: len(at)] = c[at]
    da, dh_now, dc_now = torch.zeros_like(gates), torch.zeros_like(c0), torch.zeros_like(c0)
    for at, before in zip(reversed(steps), reversed(befores)):
        n, (i, f, g, o), tanh_c = len(at), gates[at].chunk(4, dim=1), c[at].tanh()
        dh_t = dh[at] + dh_now[:n]
        dc_t = dc_now[:n] + dh_t * o * (1 - tanh_c**2) + (0 if dc is None else dc[at])
        da[at] = torch.cat((dc_t * g * i * (1 - i), dc_t * before * f * (1 - f),
                            dc_t * i * (1 - g**2), dh_t * tanh_c * o * (1 - o)), dim=1)
        dh_now[:n], dc_now[:n] = product(da[at], w_hh.mT), dc_t * f
    dx = da[:, :0] if w_ih is None else product(da, w_ih.mT)
    return da, dx, dh_now, dc_now


def weight_gradients(da, x, h, h0, sizes, reverse):
    before, now = torch.zeros_like(h), h0.clone()
    for at in walk(sizes, reverse):
        before[at], now[: len(at)] = now[: len(at)], h[at]
    return product(da.mT, x.mT), product(da.mT, before.mT), da.sum(0)


# ---- Arguments that fit ----


def draw_sizes(r):
    """B, T, H, I, and row counts that never grow; now and then nothing at all."""
    B, T = r.choice([0, 1, 2, 3, 7, 17, 33]), r.choice([0, 1, 1, 2, 3, 5])
    H, I = r.choice([1, 2, 3, 5, 8, 15, 16, 17, 31, 97]), r.choice([0, 1, 2, 9, 33])
    sizes = sorted((r.randint(0, B) for _ in range(T)), reverse=True)
    sizes = [B] + (sizes[1:] if r.random() < 0.5 else [B] * (T - 1)) if T else []
    return B, H, I, sizes, sum(sizes)


def forward_arguments(r, tensor):
    B, H, I, sizes, N = draw_sizes(r)
    return dict(x=tensor(N, I), w_ih=tensor(4 * H, I) * max(I, 1)**-0.5, bias=tensor(4 * H),
                h0=tensor(B, H), c0=tensor(B, H), w_hh=tensor(4 * H, H) * H**-0.5, sizes=sizes,
                reverse=r.random() < 0.5, save=r.random() < 0.5)


def backward_arguments(r, tensor):
    B, H, I, sizes, N = draw_sizes(r)
    gates = tensor(N, 4 * H).sigmoid()
    gates[:, 2 * H : 3 * H] = 2 * gates[:, 2 * H : 3 * H] - 1  # g is a tanh
    return dict(dh=tensor(N, H), dc=tensor(N, H) if r.random() < 0.5 else None, gates=gates,
                c=tensor(N, H), c0=tensor(B, H),
                w_ih=tensor(4 * H, I) * (4 * H)**-0.5 if r.random() < 0.8 else None,
                w_hh=tensor(4 * H, H) * (4 * H)**-0.5, sizes=sizes, reverse=r.random() < 0.5)


def weight_gradients_arguments(r, tensor):
    B, H, I, sizes, N = draw_sizes(r)
    return dict(da=tensor(N, 4 * H) * max(N, 1)**-0.5, x=tensor(N, I), h=tensor(N, H),
                h0=tensor(B, H), sizes=sizes, reverse=r.random() < 0.5)


OPERATORS = {"lstm_forward": (forward_arguments, forward),
             "lstm_backward": (backward_arguments, backward),
             "lstm_weight_gradients": (weight_gradients_arguments, weight_gradients)}


def fits(arguments):
    """Whether an operator must accept these: written anew here, for tensors and names alone."""
    a = arguments
    tensors = {name: t for name, t in a.items() if isinstance(t, torch.Tensor)}
    first = a["da" if "da" in a else "w_hh"]
    if any(t.layout != torch.strided or t.dtype != first.dtype or t.device != first.device
           or t.dim() != (1 if name == "bias" else 2) for name, t in tensors.items()):
        return False
    B, H = a["h0" if "da" in a else "c0"].shape
    sizes = a["sizes"]
    N = (a["x"] if "x" in a else a["gates"]).shape[0]
    I = next((a[name].shape[1] for name in ("x", "w_ih") if name in tensors), 0)
    shapes = {"x": (N, I), "w_ih": (4 * H, I), "bias": (4 * H,), "h0": (B, H), "c0": (B, H),
              "w_hh": (4 * H, H), "dh": (N, H), "dc": (N, H), "c": (N, H), "gates": (N, 4 * H),
              "da": (N, 4 * H), "h": (N, H)}
    return (H > 0 and first.dtype in TYPES and all(t.shape == shapes[n] for n, t in tensors.items())
            and sizes == sorted(sizes, reverse=True) and sum(sizes) == N
            and (not sizes or sizes[0] == B and sizes[-1] >= 0))


# ---- Attacks ----


# The same numbers, but in memory in another way
VIEWS = [lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
         lambda t: torch.stack((t, t), dim=-1)[..., 1], lambda t: torch.cat((t, t))[len(t):],
         lambda t: t[:1].clone().expand(t.shape),
         lambda t: torch.complex(t.float(), -t.float()).conj().imag.to(t.dtype)
         if t.dtype == torch.float32 else t,  # negative by a mark, not in memory
         lambda t: t.as_strided(t.shape, (0,) * t.dim()) if t.numel() else t]

# Most of them do not fit any more
DAMAGE = [lambda t: t[0] if len(t) else t, lambda t: t[None], lambda t: t[1:], lambda t: t[..., 1:],
          lambda t: t.double(), lambda t: t.half(), lambda t: t.long(), lambda t: t.bool(),
          lambda t: t.to(torch.complex64), lambda t: t.to("meta"), lambda t: t.to_sparse(),
          lambda t: torch.cat((t, t)), lambda t: t.mT if t.dim() > 1 else t, lambda t: t.sum(),
          lambda t: t[:0], lambda t: t[..., :0], lambda t: t.new_zeros(()).expand(2**20, 2**20),
          lambda t: t.new_zeros(1).expand(2**40, *t.shape[1:]), lambda t: t.float().to_mkldnn(),
          lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint8)]

SIZES = [lambda s: [*s, 1], lambda s: [*s, 0], lambda s: s[1:], lambda s: s[::-1], lambda s: [],
         lambda s: [-n for n in s], lambda s: [*s, 2**62], lambda s: [2**62] * 4,
         lambda s: [-2**63, *s], lambda s: [n + 1 for n in s], lambda s: [*s, -1, 1],
         lambda s: [sum(s)], lambda s: [1] * sum(s), lambda s: [s[0] + 1, s[1] - 1, *s[2:]]
         if len(s) > 1 else s]


def attack(name, seed):
    r = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    torch.set_num_threads(r.choice([1, 1, 2, 3]))
    kernels = [k for k in torch.ops.rnn.kernels() if k not in ("steps", "persistent")]
    torch.ops.rnn.use_kernel(r.choice(kernels))
    make, exact = OPERATORS[name]
    dtype = r.choice(TYPES)
    a = make(r, lambda *shape: torch.randn(shape, dtype=torch.float32).to(dtype))
    tensors = [n for n, t in a.items() if isinstance(t, torch.Tensor)]
    for n in tensors:
        if a[n].numel() and r.random() < 0.1 and not (name == "lstm_backward" and dtype
                                                      == torch.bfloat16):  # there o is 1: inf * 0
            a[n] = a[n].clone()
            a[n].view(-1)[r.randrange(a[n].numel())] = r.choice([math.nan, math.inf, -math.inf])
        if r.random() < 0.4:
            a[n] = r.choice(VIEWS)(a[n])
    if r.random() < 0.4:  # one argument is damaged, or is one that was meant for another
        n = r.choice([*tensors, *(["sizes"] * 3 if "sizes" in a else [])])
        if n == "sizes":
            a[n] = r.choice(SIZES)(a[n])
        else:
            a[n] = r.choice(DAMAGE)(a[n]) if r.random() < 0.8 else a[r.choice(tensors)]
    leaves = [a[n] for n in tensors if a[n].is_floating_point() and r.random() < 0.2
              and a[n].layout == torch.strided and not a[n].is_quantized]
    world = r.choice(["here"] * 8 + ["meta", "fake"])
    if any(a[n].layout != torch.strided or a[n].is_quantized for n in tensors):
        world = "here"  # there are no such fake tensors
    elif world == "meta":
        a |= {n: a[n].to("meta") for n in tensors}
    right = fits(a)
    mode = r.choice([torch.enable_grad, torch.no_grad, torch.inference_mode])
    run = getattr(torch.ops.rnn, name)
    try:
        if world == "fake":
            with FakeTensorMode(allow_non_fake_inputs=False) as fake:
                results = run(*(fake.from_tensor(t) if isinstance(t, torch.Tensor) else t
                                for t in a.values()))
        else:
            with mode():
                results = run(*(t.detach().requires_grad_() if any(t is leaf for leaf in leaves)
                                else t for t in a.values()))
    except REFUSALS as error:
        assert not right or "can't allocate memory" in str(error), error
        return "refused"
    if world != "here" and not right:
        return "traced"  # shapes alone: what does not fit is found when it runs
    assert right, f"{name} accepted what does not fit"
    results = results if isinstance(results, tuple) else (results,)
    if any(t.numel() > 2**33 for t in (*results, *(a[n] for n in tensors))):
        return "traced"
    if world != "here":
        expected = exact(*(torch.ones_like(t, dtype=torch.float64, device="cpu")
                           if isinstance(t, torch.Tensor) else t for t in a.values()))
        assert [(t.shape, t.stride(), t.dtype) for t in results] == [
            (t.shape, torch.empty(t.shape).stride(), type_of_results(name, dtype))
            for t in expected]
        return "traced"
    compare(name, a, results)
    if mode is torch.enable_grad and leaves and results[0].numel():
        with pytest.raises(RuntimeError, match="derivative for rnn::.* is not implemented"):
            results[0].sum().backward()
    return "right"


def type_of_results(name, dtype):
    """The weights' gradients are never rounded to bfloat16."""
    low = name == "lstm_weight_gradients" and dtype == torch.bfloat16
    return torch.float32 if low else dtype


def compare(name, a, results):
    arguments = [t.double() if isinstance(t, torch.Tensor) else t for t in a.values()]
    expected = OPERATORS[name][1](*arguments)
    if name == "lstm_forward":  # NaN is right too where only that sigmoid's being tiny avoids it
        either = [t.isnan() & ~e.isnan() for t, e in zip(forward(*arguments, tiny=0), expected)]
        results, expected = ([t.masked_fill(m, 0) for t, m in zip(r, either)]
                             for r in (results, expected))
    if name == "lstm_forward" and a["save"]:  # where c is NaN so may be the gates
        lost = expected[1].isnan().repeat(1, 4)
        results, expected = ([*r[:2], r[2].masked_fill(lost, 0)] for r in (results, expected))
    dtype = next(t for t in a.values() if isinstance(t, torch.Tensor)).dtype
    if name == "lstm_backward" and dtype != torch.bfloat16 and not expected[1].isfinite().all():
        # torch's product spreads infinity and NaN to columns that have none
        assert results[1].shape == expected[1].shape
        results, expected = ([r[0], *r[2:]] for r in (results, expected))
    for t, e in zip(results, expected, strict=True):
        assert t.shape == e.shape and t.is_contiguous() and t.dtype == type_of_results(name, dtype)
        t = t.to(dtype)
        assert torch.equal(t.isnan(), e.isnan())
        assert torch.equal(t[e.isinf()].double(), e[e.isinf()])
        close([t[e.isfinite()]], [e[e.isfinite()]], dtype, times=64)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", OPERATORS)
def test_random_attacks(name):
    seen = {}
    for seed in range(FIRST, FIRST + ATTACKS):
        try:
            outcome = attack(name, seed)
        except BaseException as error:
            raise AssertionError(f"attack('{name}', {seed}) succeeded") from error
        seen[outcome] = seen.get(outcome, 0) + 1
    print(name, seen)  # shown by -s
    assert ATTACKS < 100 or all(seen[k] > ATTACKS / 50 for k in ("right", "refused", "traced"))


# ---- What the attacks found, and what they cannot draw ----


def some(name, dtype, B, H, sizes, reverse=False):
    N = sum(sizes)
    make = {"lstm_forward": dict(x=(N, 9), w_ih=(4 * H, 9), bias=(4 * H,), h0=(B, H), c0=(B, H)),
            "lstm_backward": dict(dh=(N, H), dc=(N, H), gates=(N, 4 * H), c=(N, H), c0=(B, H),
                                  w_ih=(4 * H, 9))}
    make = make[name] | {"w_hh": (4 * H, H)}
    a = {n: torch.rand(shape).to(dtype) * 0.2 for n, shape in make.items()}
    return a | dict(sizes=sizes, reverse=reverse) | (dict(save=False) if "x" in a else {})


@pytest.mark.parametrize("name", ["lstm_forward", "lstm_backward"])
@pytest.mark.parametrize("B,H", [(17, 97), (3, 5)])
@pytest.mark.parametrize("kernel,dtype", ON_CPU, ids=str, indirect=["kernel"])
def test_all_arguments_transposed(name, kernel, dtype, B, H):
    a = some(name, dtype, B, H, [B, B, 1])
    a = {n: VIEWS[1](t) if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    compare(name, a, getattr(torch.ops.rnn, name)(*a.values()))


@pytest.mark.parametrize("name,where", [
    *(("lstm_forward", n) for n in ("x", "bias", "h0", "c0")),
    *(("lstm_backward", n) for n in ("dh", "dc", "c0"))])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("B,H", [(17, 97), (3, 5)])
@pytest.mark.parametrize("kernel,dtype", ON_CPU, ids=str, indirect=["kernel"])
def test_infinity_goes_where_the_equations_send_it(name, where, kernel, dtype, B, H, reverse):
    a = some(name, dtype, B, H, [B, B], reverse)
    a[where][1 if where != "bias" else ...] = math.inf
    compare(name, a, getattr(torch.ops.rnn, name)(*a.values()))


@pytest.mark.parametrize("kernel,dtype", ON_CPU, ids=str, indirect=["kernel"])
@pytest.mark.parametrize("name", ["lstm_forward", "lstm_backward"])
@pytest.mark.parametrize("B,H,sizes", [(17, 97, [17, 17, 3]), (33, 130, [33, 33]), (3, 5, [3, 1])])
def test_no_result_depends_on_memory_that_was_never_written(name, kernel, dtype, B, H, sizes):
    """torch can fill new tensors with NaN."""
    a, run = some(name, dtype, B, H, sizes), getattr(torch.ops.rnn, name)
    expected = run(*a.values())
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        results = run(*a.values())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(r, e) for r, e in zip(results, expected))


def test_no_derivative_is_zero_in_silence():
    a = some("lstm_forward", torch.float32, 3, 5, [3, 2])
    run, rest = torch.ops.rnn.lstm_forward, list(a.values())[1:]
    for derive in (lambda: torch.func.grad(lambda x: run(x, *rest)[0].sum())(a["x"]),
                   lambda: torch.func.jvp(lambda x: run(x, *rest)[0], (a["x"],), (a["x"],)),
                   lambda: torch.func.jacrev(lambda x: run(x, *rest)[0])(a["x"])):
        with pytest.raises(RuntimeError, match="not implemented|does not support"):
            derive()
    for t in torch.func.vmap(lambda x: run(x, *rest)[0])(torch.stack((a["x"],) * 2)):
        assert torch.equal(t, run(*a.values())[0])
