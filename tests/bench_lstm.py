"""How fast the fused LSTM is: beside torch.nn.LSTM, this library's plain path and the machine.

    python tests/bench_lstm.py                       the whole table (about ten minutes)
    python tests/bench_lstm.py --threads 2 --work train --seconds 1 --shapes 0 3
    python tests/bench_lstm.py --memory              peak memory of training steps instead
    python tests/bench_lstm.py --work sample         rnn.generate and the same loop with nn.LSTM
    python tests/bench_lstm.py --device cuda --seconds 0.5       on a GPU: nn.LSTM is cuDNN's

Every shape is first checked for equality, outputs and gradients. Then the three run by turns, over
and over, on the same input; what is printed are medians, and the medians of the ratios of
neighbours, since machines are noisy. roof: what part of the speed of one large matrix product
(2048 x 2048 in float32, measured just before) the layer's arithmetic reaches. On a GPU the times
are those of CUDA events, and TF32 is off: all three compute with float32's own products.

The first line says on which CPU, with which instruction sets, and which kernel ran: the best that
the CPU has, or the one that RNN_KERNEL names. --json FILE writes all lines of all tables.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import time

import torch
from conftest import ROOT  # noqa: F401 (makes rnn importable)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn

SHAPES = [(32, 35, 64, 256), (50, 50, 65, 128), (64, 100, 128, 512), (1, 100, 64, 256),
          (128, 128, 256, 256), (16, 64, 32, 64), (64, 256, 256, 512), (8, 64, 128, 128)]

GPU_SHAPES = [(B, T, H, H) for B in (16, 64) for T in (128, 1024) for H in (256, 512, 768, 1024)]
TYPES = ["float32", "float64", "float16", "bfloat16"]


RESULTS = []  # of all tables, a dict for each line


def cpu():
    """The CPU's name, and those of its instruction sets that matter here."""
    path = pathlib.Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*: (.*)", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.M)
    flags = flags[1].split() if flags else []
    sets = [s for s in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd") if s in flags]
    return name[1] if name else platform.processor(), sets


def timed(function, calls=1, device="cpu"):
    """Seconds per call, of so many calls in a row."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def interleaved(functions, seconds, device="cpu"):
    """The times of each function, by turns, at least three and for so long. A turn is as many
    calls as fit into 20 ms, so that none meets only the caches that another one has left."""
    for function in functions:
        function()  # warm up
    calls = [max(1, int(0.02 / timed(function, 1, device))) for function in functions]
    times = [[] for _ in functions]
    begin = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - begin < seconds:
        for function, n, column in zip(functions, calls, times):
            column.append(timed(function, n, device))
    return times


def ratio(slow, fast):
    return statistics.median(a / b for a, b in zip(slow, fast))


def setup(shape, work, check=True, device="cpu", dtype=torch.float32):
    """The three rivals as functions without arguments, and the arithmetic of one call in flop."""
    B, T, I, H = shape
    torch.manual_seed(0)
    low = device == "cpu" and dtype == torch.bfloat16  # under autocast, as one trains on a CPU
    like = dict(device=device, dtype=torch.float32 if low else dtype)
    theirs, fused = nn.LSTM(I, H, **like), rnn.LSTM(I, H, **like)
    fused.load_state_dict(theirs.state_dict())

    class Plain(rnn.LSTM):
        def step(self, *args):  # any step but lstm_step itself takes the plain path
            return rnn.lstm_step(*args)

    plain = Plain(I, H, **like)
    plain.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, **like)
    rows = T * B
    if work == "packed":
        lengths = torch.randint(1, T + 1, (B,))
        lengths[0] = T
        rows = int(lengths.sum())
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    data = (x.data if work == "packed" else x).requires_grad_(work != "infer")
    autocast = torch.autocast("cpu", dtype, enabled=low)
    close = 3e-2 if low else 1e-4  # of the largest
    weight = torch.randn(rows, H, **like).view(*data.shape[:-1], H)

    def step(layer):
        def run():
            data.grad = None
            layer.zero_grad()
            with autocast:
                output = layer(x)[0]
            output = output.data if work == "packed" else output
            output.backward(weight.to(output.dtype))
        return run

    def infer(layer):
        def run():
            with torch.no_grad(), autocast:
                layer(x)
        return run

    layers = [fused, theirs, plain]
    gradients = []
    for layer in layers if check else []:
        if work == "infer":
            with autocast:
                gradients.append([layer(x)[0]])
        else:
            step(layer)()
            gradients.append([data.grad, *(p.grad for p in layer.parameters())])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            largest = float(b.detach().abs().max())
            torch.testing.assert_close(a.float(), b.float(), rtol=10 * close,
                                       atol=close * largest + 1e-6)
    flop = 8 * rows * H * (I + H) * (1 if work == "infer" else 3)
    return [(infer if work == "infer" else step)(layer) for layer in layers], flop


def sample_table(threads, seconds):
    """Sampling 500 symbols with the model that train_shakespeare.py trains: rnn.generate on its two
    paths, and the same loop as one writes it with torch's modules."""
    torch.manual_seed(0)
    vocab = rnn.Vocab([chr(ord("0") + k) for k in range(65)])
    model = rnn.CharLM(len(vocab), embed=64, hidden=512).eval()
    layer = nn.LSTM(64, 512)
    layer.load_state_dict(model.rnn.state_dict())
    native = rnn.fused

    def ours(path):
        rnn.fused = path
        "".join(rnn.generate(model, vocab, "0", length=500, seed=1))
        rnn.fused = native

    @torch.no_grad()
    def theirs():
        random = torch.Generator().manual_seed(1)
        text, symbol, state = "0", torch.tensor([0]), None
        for _ in range(500):
            y, state = layer(model.embedding(symbol)[None], state)  # (1, 1, H)
            chances = model.output(y[0]).softmax(-1)  # (1, V)
            symbol = torch.multinomial(chances, 1, generator=random)[0]  # (1,)
            text += vocab.symbols[symbol]

    times = interleaved([lambda: ours(native), lambda: ours(None), theirs], seconds)
    fused, plain, torchs = (statistics.median(column) * 1e6 / 500 for column in times)
    print(f"\nsample, {threads} threads, us a symbol: fused {fused:.0f}, plain {plain:.0f}, "
          f"nn.LSTM {torchs:.0f}\nnn.LSTM/fused {ratio(times[2], times[0]):.2f}, nn.LSTM/plain "
          f"{ratio(times[2], times[1]):.2f}", flush=True)


def peak_memory(shape, rival):
    """MiB that three training steps add to a process of their own, at its peak."""
    functions, _ = setup(shape, "train", check=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        functions[rival]()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_table(shapes):
    print("\npeak memory of training steps, MiB\n    B    T    I    H    fused  nn.LSTM")
    for k in shapes:
        line = "".join(f"{n:5}" for n in SHAPES[k])
        for rival in ("0", "1"):
            command = [sys.executable, __file__, "--peak", str(k), rival]
            line += f"{float(subprocess.check_output(command, text=True)):9.1f}"
        print(line, flush=True)


def cpu_table(work, name, threads, args):
    print(f"\n{work}, {name}, {threads} threads\n    B    T    I    H   fused ms  nn.LSTM/"
          "fused  plain/fused   roof", flush=True)
    a = torch.randn(2048, 2048)
    ratios = []  # of each shape: nn.LSTM to fused, and the plain path to fused unless left out
    for k in args.shapes:
        functions, flop = setup(SHAPES[k], work, dtype=getattr(torch, name))
        if args.no_plain:
            functions = functions[:2]
        gemm = interleaved([lambda: a @ a], 0.3)[0]
        times = interleaved(functions, args.seconds)
        ratios.append([ratio(other, times[0]) for other in times[1:]])
        fused = statistics.median(times[0])
        roof = flop / fused / (2 * 2048**3 / statistics.median(gemm))
        RESULTS.append({"work": work, "dtype": name, "threads": threads, "shape": SHAPES[k],
                        "fused_s": fused, "nn_over_fused": ratios[-1][0], "roof": roof})
        print("".join(f"{n:5}" for n in SHAPES[k]) + f"{fused * 1e3:11.3f}"
              f"{ratios[-1][0]:15.2f}{''.join(f'{r:13.2f}' for r in ratios[-1][1:]):13}{roof:7.0%}",
              flush=True)
    columns = list(zip(*ratios))
    means = "".join(f"{statistics.geometric_mean(column):13.2f}" for column in columns)
    least = ", ".join(f"{min(column):.2f}" for column in columns)
    print(f"geometric mean{means:>{19 + 13 * len(columns)}}   (least {least})", flush=True)


def cpu_tables(args):
    for threads in args.threads:
        torch.set_num_threads(threads)
        if "sample" in args.work:
            sample_table(threads, args.seconds)
        for name in args.dtype or ["float32"]:
            for work in args.work:
                if work != "sample":
                    cpu_table(work, name, threads, args)


def gpu_tables(works, types, seconds):
    torch.backends.cudnn.allow_tf32 = False
    for name in types:
        dtype = getattr(torch, name)
        for work in works:
            print(f"\n{work}, {name}, {torch.cuda.get_device_name()}\n    B    T    I    H   fused "
                  "ms  nn.LSTM ms  nn.LSTM/fused  plain/fused", flush=True)
            over_nn = []
            for shape in GPU_SHAPES:
                # In 16 bits the sums of a thousand steps differ too much for this check
                check = dtype in (torch.float32, torch.float64)
                functions, _ = setup(shape, work, check, "cuda", dtype)
                fused, theirs, plain = interleaved(functions, seconds, "cuda")
                over_nn.append(ratio(theirs, fused))
                RESULTS.append({"work": work, "dtype": name, "shape": shape,
                                "fused_s": statistics.median(fused), "nn_over_fused": over_nn[-1]})
                print("".join(f"{n:5}" for n in shape) + f"{statistics.median(fused) * 1e3:11.3f}"
                      f"{statistics.median(theirs) * 1e3:12.3f}{over_nn[-1]:15.2f}"
                      f"{ratio(plain, fused):13.2f}", flush=True)
            print(f"geometric mean{statistics.geometric_mean(over_nn):44.2f}   "
                  f"(least {min(over_nn):.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", nargs="+", default=["train", "infer", "packed"],
                        choices=["train", "infer", "packed", "sample"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=TYPES, nargs="+",
                        help="default: on a CPU float32, on a GPU all")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line of the table")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write all results there as well")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rnn.build()
    if args.peak:
        return print(peak_memory(SHAPES[args.peak[0]], args.peak[1]))
    machine = dict(zip(("cpu", "sets"), cpu()), torch=torch.__version__,
                   kernel=os.environ.get("RNN_KERNEL") or torch.ops.rnn.kernels()[-1])
    print(machine, flush=True)
    if args.device == "cuda":
        if not rnn.fused.has_cuda:
            parser.error("the fused LSTM was built without CUDA")
        gpu_tables(args.work, args.dtype or TYPES, args.seconds)
    elif args.memory:
        memory_table(args.shapes)
    else:
        cpu_tables(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**machine, "results": RESULTS}, file, indent=1)


if __name__ == "__main__":
    main()
