"""Two processes train one model: equal to one process, and none is left waiting for the other.

torchrun starts this file as a script (see the end), which runs train_shakespeare.py in float64."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from script import SMALL, finish, run

import rnn

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(),
                                reason="torch without torch.distributed")
LAYERS = ("--data", "text.txt", *SMALL, "--layers", 2, "--steps", 20)
# No autocast; the model itself is float64, see below.
EXACT = (*LAYERS, "--dropout", 0, "--embed-dropout", 0, "--dtype", "float32")

# Gradients are summed in another order, which changes the last of float64's 16 digits. Where one is
# nearly 0, Adam makes that larger: it divides each by its size. Seen were differences of 1e-13.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def two(folder, *arguments):
    """This file in two processes; returns the process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               __file__, *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ended(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("final val_loss=") == output.count("at temperature 0.8:") == 1
    return output


@pytest.fixture
def folder(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(a, b, **tolerances):
    """Of two checkpoints: weights, the best ones, the state of all rows, what was reached."""
    a, b = (torch.load(path) for path in (a, b))
    one, two = a["training"], b["training"]
    assert a["weights"]["output.weight"].dtype == torch.float64
    assert one["state"][0].shape == (2, 4, 16)  # layers, all rows, H
    for key in ("weights", "state", "optimizer"):
        left, right = (content.get(key, content["training"].get(key)) for content in (a, b))
        torch.testing.assert_close(left, right, **tolerances)
    torch.testing.assert_close(one["run"]["weights"], two["run"]["weights"], **tolerances)
    assert one["run"]["step"] == two["run"]["step"] == 20 and one["position"] == two["position"]
    histories = one["run"]["history"], two["run"]["history"]
    for (step, _, loss), (other_step, _, other) in zip(*histories, strict=True):
        assert step == other_step and loss == pytest.approx(other, rel=1e-6)  # summed in float32


@pytest.mark.slow
def test_two_processes_equal_one(folder, double):
    """Interrupted in the eleventh step by Ctrl-C and resumed, by as many processes or by one: as if
    one process had never been interrupted. Dropout differs between processes, so there is none."""
    whole, half = two(folder, "", *EXACT, "--out", "two"), two(folder, 11, *EXACT, "--out", "half")
    run(*EXACT, "--out", "one")
    output = ended(whole)
    assert output.count("step 20 held-out") == 1 and ", 2 processes" in output
    assert "step 11 held-out" in ended(half)
    assert_same("one/last.pt", "two/last.pt", **ROUNDING)
    rest = two(folder, "", "--resume", "half/last.pt", "--out", "of two")
    run("--resume", "half/last.pt", "--out", "of one")
    ended(rest)
    assert_same("one/last.pt", "of one/last.pt", **ROUNDING)
    assert_same("two/last.pt", "of two/last.pt", rtol=0, atol=0)


@pytest.mark.slow
def test_dropout_in_two_processes(folder):
    """Resumed, each drops the same units as without an interruption, and not those of the other."""
    whole = two(folder, "", *LAYERS, "--out", "two")
    half = two(folder, 7, *LAYERS, "--out", "half")
    ended(whole)
    ended(half)
    ended(two(folder, "", "--resume", "half/last.pt"))
    assert_same("two/last.pt", "half/last.pt", rtol=0, atol=0)
    assert (folder / "seed0").read_text() != (folder / "seed1").read_text()


@pytest.mark.slow
def test_bad_flags_reach_every_process(folder):
    code, _, errors = finish("--data", "text.txt", *SMALL, "--batch", 5, "--steps", 2, processes=2,
                             cwd=folder)
    assert code == 1 and "error: --batch must be a multiple of the 2 processes, got 5" in errors
    assert not os.path.exists("out")


@pytest.mark.slow
def test_sampling_in_two_processes(folder):
    run("--data", "text.txt", *SMALL, "--steps", 2)
    sample = ("--sample", "out/best.pt", "--batch", 5, "--length", 9)
    code, output, errors = finish(*sample, processes=2, cwd=folder)
    assert code == 0 and len(output) == 10, errors


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint(folder):
    job = two(folder, "", *EXACT, "--steps", 10**6, "--out", "out")
    last = folder / "out" / "last.pt"
    while job.poll() is None and not (folder / "pid1").is_file():
        time.sleep(0.1)
    os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1 and "Signal 9" in errors
    assert rnn.load(last)[2]["run"]["step"] == 0  # the one of the beginning


if __name__ == "__main__":
    at, *arguments = sys.argv[1:]
    torch.set_default_dtype(torch.float64)
    rank, plain, steps = os.environ["RANK"], rnn.backward, []

    def backward(*args, **options):
        steps.append(1)
        if rank == "0" and at == str(len(steps)):
            signal.raise_signal(signal.SIGINT)  # the other process hears of it
        if len(steps) == 20:
            pathlib.Path(f"seed{rank}").write_text(str(torch.initial_seed()))
            pathlib.Path(f"pid{rank}").write_text(str(os.getpid()))
        return plain(*args, **options)

    rnn.backward = backward
    run(*arguments)
