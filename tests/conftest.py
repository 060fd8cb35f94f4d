"""What all tests share: the import path, and the table of layers that are drop-ins for torch's."""

import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

ROOT = pathlib.Path(__file__).parent.parent
# Of the processes that tests start: torch warns where there is no NumPy, which nothing here needs.
os.environ["PYTHONWARNINGS"] = "ignore:Failed to initialize NumPy:UserWarning"
sys.path.insert(0, str(ROOT))

# name: (class name, further arguments)
KINDS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text():
    """A small text with structure enough to be learnt, made here."""
    names = ["Ann", "Bob", "Cem"]
    verbs = ["sees", "hears", "calls"]
    lines = [f"{a} {v} {b}.\n" for a in names for v in verbs for b in names if a != b]
    return "".join(lines[k * 7 % len(lines)] for k in range(120))


@pytest.fixture
def vocab(text):
    import rnn

    return rnn.Vocab.of(text)


@pytest.fixture
def ids(text, vocab):
    return vocab.encode(text)


def small(vocab, **options):
    """A character model that learns in a second."""
    import rnn

    torch.manual_seed(0)
    return rnn.initialize(rnn.CharLM(len(vocab), **{"embed": 8, "hidden": 12, **options}))


def write_checkpoint(content, path, save=torch.save):
    """Any content as rnn.save would write it: with the right checksum at its end."""
    buffer = io.BytesIO()
    save(content, buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def pytest_collection_modifyitems(items):
    """Only an LSTM without projection has a fused path: of tests that name another layer, by
    `kind` or `cls`, one of the two runs with `path` is enough."""
    def needed(item):
        given = item.callspec.params if hasattr(item, "callspec") else {}
        layer = given.get("kind", getattr(given.get("cls"), "__name__", "lstm").lower())
        return given.get("path") != "fused" or layer == "lstm" and not given.get("more")

    items[:] = [item for item in items if needed(item)]


@pytest.fixture(params=["plain", "fused"])
def path(request, monkeypatch):
    """Runs a test twice: with rnn.LSTM on its plain path, and with the fused one."""
    import rnn

    if request.param == "plain":
        monkeypatch.setattr(rnn, "fused", None)
    else:
        build_fused()
    return request.param


def use_kernel(name):
    """From now on the fused LSTM runs this kernel; skips the test where that cannot be."""
    build_fused()
    if name not in torch.ops.rnn.kernels():
        pytest.skip(f"RNN_KERNEL={name} cannot run here")
    torch.ops.rnn.use_kernel(name)


@pytest.fixture
def kernel(request):
    """For tests with `parametrize("kernel", [...], indirect=True)`: the test runs with that one."""
    import rnn

    use_kernel(request.param)
    yield request.param
    torch.ops.rnn.use_kernel(rnn.KERNEL)


# Where and in which type the fused LSTM runs: kernel, device, type. Each kernel stands with the
# types that it computes in a way of its own; `simple` also with bfloat16, which it hands on.
PLACES = [("simple", "cpu", torch.float64), ("simple", "cpu", torch.bfloat16),
          ("vector", "cpu", torch.float64), ("vector", "cpu", torch.float32),
          ("vector", "cpu", torch.bfloat16),
          ("avx512_bf16", "cpu", torch.bfloat16),
          ("amx", "cpu", torch.float32), ("amx", "cpu", torch.bfloat16)]
if torch.cuda.is_available():
    PLACES += [("steps", "cuda", dtype)
               for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
    PLACES += [("persistent", "cuda", dtype)
               for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-{place[2]}".replace("torch.", ""))
def place(request):
    """Device and type, for a test whose body is the same for all kernels."""
    import rnn

    kernel, device, dtype = request.param
    use_kernel(kernel)
    yield device, dtype
    torch.ops.rnn.use_kernel(rnn.KERNEL)


def need_gpu():
    """Skips the test unless the fused LSTM can run on a GPU here."""
    import rnn

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    build_fused()
    if not rnn.fused.has_cuda:
        pytest.skip("the fused LSTM was built without CUDA: no toolkit that fits torch's")


def flat(value):
    """All tensors in nested tuples, packed sequences and None."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for v in value or () for t in flat(v)]


def close(ours, theirs, dtype, times=32):
    """Compares results computed in `dtype`, anywhere, with the same in float64 on the CPU. A sum of
    rounded products errs by a few units in the last place of its largest terms, and errors are
    handed on through a few steps: so many times the type's eps, relative to the largest entry."""
    for a, b in zip(ours, theirs, strict=True):
        if b is None or b.numel() == 0:
            assert a is None or a.shape == b.shape
            continue
        assert a.dtype == dtype and a.shape == b.shape
        bound = times * torch.finfo(dtype).eps * max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=0, atol=bound)


def build_fused():
    """Skips what needs the fused LSTM only without a compiler, or with RNN_KERNEL=plain."""
    import rnn

    if rnn.KERNEL == "plain":
        pytest.skip("RNN_KERNEL=plain")
    if not rnn.fused and not (shutil.which("c++") or shutil.which("cl")):
        pytest.skip("no C++ compiler: the fused LSTM cannot be built")
    rnn.build()


def python(code, cwd, **environment):
    """Run this code in another Python."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=300)
