"""Several processes train one model: two equal one, and none is left waiting for another.

The processes that pytest starts run this file as a script: see the end.
"""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import rnn
import train_shakespeare

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

JOBS = {"sequential": {}, "random": {"order": "random"}, "accumulate": {"accumulate": 2},
        "plateau": {"cell": "gru", "schedule": "plateau", "evals": 10, "lr": 0.3},
        "patience": {"evals": 10, "patience": 2, "lr": 10.0}, "dropout": {"dropout": 0.3}}
IDS = torch.randint(8, (2000,), generator=torch.Generator().manual_seed(0))


def train(out, resume=None, at_11=None, cell="lstm", dropout=0.0, **options):
    """Twenty steps of 4 rows in float64. In the eleventh at_11 is called; what it returns, unless
    that is None, takes the place of the loss."""
    torch.manual_seed(1)
    model = rnn.CharLM(8, embed=4, hidden=6, layers=2, cell=cell, dropout=dropout).double()
    if resume:
        saved = torch.load(resume)
        model, resume = rnn.CharLM(**saved["config"]).double(), saved["training"]
        model.load_state_dict(saved["weights"])
    steps, plain = [], rnn.backpropagate

    def backpropagate(*args):
        loss, state = plain(*args)
        steps.append(1)
        other = at_11() if at_11 and len(steps) == 11 else None
        return loss if other is None else other, state

    length = {} if "seconds" in options else {"steps": 20}
    settings = {"batch": 4, "context": 8, "lr": 1e-2, "evals": 2, **length, **options}
    world = train_shakespeare.Together() if dist.is_initialized() else None
    with (mock.patch.object(rnn, "backpropagate", backpropagate),
          train_shakespeare.ctrl_c_between_steps() as pressed):
        return train_shakespeare.train(model, rnn.Vocab("abcdefgh"), IDS[:1800], IDS[1800:],
                                       str(out), resume=resume, stop=pressed, world=world,
                                       **settings)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


# ---- what two processes do together, for the tests below ----


def all_jobs(folder, rank):
    results = {}
    for name, options in JOBS.items():
        results[name] = train(folder / "two" / name, **options)
    results["dropped"] = torch.rand(3).tolist()  # what the last step would drop next
    for name in ("sequential", "dropout"):  # interrupted and resumed; rank 1 hears of it
        half, press = folder / "half" / name, ctrl_c if rank == 0 else None
        results[f"half {name}"] = train(half, at_11=press, **JOBS[name])
        train(folder / "rest" / name, resume=half / "last.pt")
    train(folder / "rest" / "of one", resume=folder / "half" / "of one" / "last.pt")
    results["seconds"] = train(folder / "seconds", seconds=0.3)
    nan = {"at_11": lambda: torch.tensor(math.nan)} if rank == 1 else {}
    for name, options in (("batch", {"batch": 5}), ("nan", nan)):
        try:
            train(folder / name, **options)
        except (ValueError, FloatingPointError) as error:
            results[name] = str(error)
    (folder / f"results{rank}.json").write_text(json.dumps(results))


def never_done(folder, rank):
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    train(folder, steps=10**6, evals=10**5)


def disk_full(folder, rank):
    save = rnn.save

    def fail(path, *args, **training):
        if training["run"]["steps"] > 0:
            raise OSError(28, "No space left on device")
        save(path, *args, **training)

    with mock.patch.object(rnn, "save", fail):
        train(folder)


def start(job, folder):
    """Two processes, as a person starts them."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--nproc-per-node=2", __file__, job, str(folder)],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything of `all_jobs`, and the same done by one process."""
    folder = tmp_path_factory.mktemp("parallel")
    train(folder / "half" / "of one", at_11=ctrl_c)
    job = start("all_jobs", folder)
    for name, options in JOBS.items():
        train(folder / "one" / name, **options)
    printed, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    by_chance = [step for step, *_ in results(folder)[0]["seconds"]["history"]].count(20)
    assert printed.count("step 20 held-out") == len(JOBS) + 2 + by_chance  # not twice as many
    return folder


def results(folder):
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in (0, 1)]


def assert_same(a, b, **tolerances):
    """Of two checkpoints: weights, the best ones, the state of all rows, what was reached."""
    a, b = torch.load(a), torch.load(b)
    one, two = a["training"], b["training"]
    assert one["state"][-1].shape[-2:] == (4, 6)  # all rows, H
    torch.testing.assert_close((a["weights"], one["best"], one["state"]),
                               (b["weights"], two["best"], two["state"]), **tolerances)
    for name in ("steps", "halvings", "stale"):
        assert one["run"][name] == two["run"][name]
    assert [h[0] for h in one["run"]["history"]] == [h[0] for h in two["run"]["history"]]
    assert one["run"]["best"] == pytest.approx(two["run"]["best"], rel=1e-6)  # summed in float32
    assert one["batches"]["position"] == two["batches"]["position"]
    assert torch.equal(one["batches"]["random"], two["batches"]["random"])


# Gradients are summed in another order, which changes the last of float64's 16 digits. Where one is
# nearly 0, Adam makes that larger: it divides each by its size. Seen were differences of 1e-15.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("name", [name for name in JOBS if name != "dropout"])
def test_two_processes_equal_one(folder, name):
    assert_same(folder / "one" / name / "last.pt", folder / "two" / name / "last.pt", **ROUNDING)
    one, two = results(folder)
    assert {**one[name], "chars_per_s": 0} == {**two[name], "chars_per_s": 0}
    assert (one[name]["steps"] < 20) == (name == "patience")


def test_resumed_by_another_number_of_processes(folder):
    """Interrupted in the eleventh step by Ctrl-C, in two processes or in one, and resumed in one or
    in two: as if never interrupted."""
    whole = folder / "one" / "sequential" / "last.pt"
    train(folder / "rest" / "of two", resume=folder / "half" / "sequential" / "last.pt")
    for name in ("sequential", "of one", "of two"):
        assert_same(whole, folder / "rest" / name / "last.pt", **ROUNDING)
    assert [result["half sequential"]["steps"] for result in results(folder)] == [11, 11]


def test_resumed_with_dropout_is_the_same_bit_for_bit(folder):
    """By as many processes; each drops other units than the other one."""
    whole, rest = (folder / name / "dropout" / "last.pt" for name in ("two", "rest"))
    assert_same(whole, rest, rtol=0, atol=0)
    a, b = results(folder)
    assert a["dropped"] != b["dropped"]


def test_a_run_of_so_many_seconds_ends_everywhere(folder):
    one, two = (result["seconds"] for result in results(folder))
    assert one["steps"] == two["steps"] > 0 and one["seconds"] == two["seconds"] >= 0.3
    assert one["history"] == two["history"]


def test_errors_reach_every_process(folder):
    for result in results(folder):
        assert result["batch"] == "batch must be a multiple of the 2 processes, got 5"
        assert result["nan"].startswith("training stopped at step 20: loss nan")


def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint(tmp_path):
    job, last = start("never_done", tmp_path), tmp_path / "last.pt"
    while job.poll() is None and not (last.exists() and rnn.load(last)[2]["run"]["steps"] > 0):
        time.sleep(0.1)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1 and "Signal 9" in errors
    step = rnn.load(last)[2]["run"]["steps"]
    assert step > 0 and rnn.load(tmp_path / "best.pt")
    assert train(tmp_path / "more", steps=step + 20, evals=2, resume=last)["steps"] == step + 20


def test_an_error_of_one_process_ends_the_job(tmp_path):
    job = start("disk_full", tmp_path)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1 and "No space left on device" in errors
    assert rnn.load(tmp_path / "last.pt")[2]["run"]["steps"] == 0


def test_the_script_in_two_processes_and_on_in_one(tmp_path, text, capsys):
    (tmp_path / "text.txt").write_text(text)
    options = ["--data", str(tmp_path / "text.txt"), "--length", "5"]
    small = ["--hidden", "16", "--embed", "8", "--batch", "4", "--context", "16"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(ROOT / "train_shakespeare.py"), *options, *small, "--steps", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final val_loss=") == done.stdout.count("at temperature 0.8:") == 1
    assert done.stdout.count("step 20 held-out") == 1 and ", 2 processes" in done.stdout
    train_shakespeare.main([*options, "--resume", str(tmp_path / "out" / "last.pt"), "--steps",
                            "30"])
    assert "step 30 held-out" in capsys.readouterr().out


if __name__ == "__main__":
    import torch.distributed.nn  # noqa: F401, first, as in train_shakespeare.py

    dist.init_process_group("gloo")
    globals()[sys.argv[1]](pathlib.Path(sys.argv[2]), dist.get_rank())
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()
    threads = [file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads  # they could abort the exit
