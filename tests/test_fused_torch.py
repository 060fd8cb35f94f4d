"""The fused LSTM inside torch: compile, export, func, autocast, threads, wrong arguments.

What it computes is tested in test_fused.py.
"""

import multiprocessing
import threading

import pytest
import torch
from conftest import ROOT, build_fused, python
from examples.cells import LayerNormLSTM, PeepholeLSTM
from test_fused import tensors
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnn


@pytest.fixture(scope="module", autouse=True)
def built():
    build_fused()


def small_layer():
    torch.manual_seed(0)
    return rnn.LSTM(3, 5, 2, bidirectional=True), torch.randn(4, 2, 3)


@pytest.fixture
def calls(monkeypatch):
    """One entry for every call of the fused LSTM: its type."""
    made, run = [], rnn.fused.lstm

    def lstm(x, *rest):
        made.append(rnn.fused.type_of(x))
        return run(x, *rest)

    monkeypatch.setattr(rnn.fused, "lstm", lstm)
    return made


# ---- compile, export, func ----


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


def test_torch_compile_keeps_the_operator_and_any_batch_size():
    """One graph, in which it stands, for all batch sizes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    layer = small_layer()[0]
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for B in (2, 3, 7):
            x = torch.randn(4, B, 3)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1 and sum("lstm_forward" in name for name in graphs[0]) == 4


@pytest.mark.parametrize("record", [
    lambda layer, x: torch.export.export(
        layer, (x,), dynamic_shapes=({1: torch.export.Dim("B", max=64)},)).module(),
    lambda layer, x: torch.export.export(
        layer, (x,), dynamic_shapes=({1: torch.export.Dim("B", max=64)},), strict=True).module(),
    lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False),
    lambda layer, x: make_fx(layer)(x),
], ids=["export", "export strict", "jit.trace", "make_fx"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_what_is_recorded_takes_the_plain_path(record, calls):
    """So it runs without this library; an exported one with any batch size."""
    layer, x = small_layer()
    recorded = record(layer, x)
    assert not calls
    for B in (2, 5) if hasattr(recorded, "_guards_fn") else (2,):
        x = torch.randn(4, B, 3)
        torch.testing.assert_close(recorded(x), layer(x))
    assert calls


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


# ---- types, and which layers use it ----


def test_other_types_take_the_plain_path(calls):
    layer, x = small_layer()
    with torch.autocast("cpu", torch.float16):
        layer(x)
    assert layer.half()(x.half())[0].dtype == torch.float16
    assert not calls


def test_the_meta_device_takes_the_plain_path(calls):
    layer, x = rnn.LSTM(3, 5, device="meta"), torch.zeros(4, 2, 3)
    assert layer(x.to("meta"))[0].is_meta
    with pytest.raises(RuntimeError, match="device"):
        layer(x)
    assert not calls


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("layer_type,input_type", [
    (torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_autocast_leaves_float64_alone(layer_type, input_type, grad, T):
    """So where only one of layer and input is float64, it raises, as torch.nn.LSTM does."""
    x = torch.randn(T, 2, 3, dtype=input_type)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        for kind in (nn.LSTM, rnn.LSTM):
            with pytest.raises(RuntimeError):
                kind(3, 5, dtype=layer_type)(x)
        double = rnn.LSTM(3, 5, dtype=torch.float64)
        assert double(x.double())[0].dtype == torch.float64


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
