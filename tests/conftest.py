"""What all tests share: the import path, and the table of layers that are drop-ins for torch's."""

import pathlib
import shutil
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
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


@pytest.fixture(params=["plain", "fused"])
def path(request, monkeypatch):
    """Runs a test twice: with rnn.LSTM on its plain path, and with the fused one."""
    import rnn

    if request.param == "plain":
        monkeypatch.setattr(rnn, "fused", None)
    else:
        build_fused()
    return request.param


def build_fused():
    """Only a machine without a compiler may skip what needs the fused LSTM."""
    import rnn

    if not rnn.fused and not (shutil.which("c++") or shutil.which("cl")):
        pytest.skip("no C++ compiler: the fused LSTM cannot be built")
    rnn.build()
