"""train_shakespeare.py, run within this process as from the command line: see `run`."""

import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

from conftest import ROOT

PATH = str(ROOT / "train_shakespeare.py")
SMALL = ("--hidden", 16, "--embed", 8, "--batch", 4, "--context", 16, "--length", 30)


def run(*arguments):
    """What the script's variables are at its end: {"run": ..., "model": ..., ...}. An error is
    raised here."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    try:
        with mock.patch.object(sys, "argv", [PATH, *map(str, arguments)]):
            return runpy.run_path(PATH, run_name="__main__")
    except SystemExit as end:  # of --sample
        assert end.code is None
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.excepthook = hook


def start(*arguments, processes=None, python=(), **options):
    """The same in a process of its own, or in several with torchrun. Returns the Popen."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *python, *(torchrun if processes else []), PATH, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*map(str, command)], env=environment, text=True, **pipes)


def finish(*arguments, **options):
    """`start`, and wait: its return code, output and errors."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors
