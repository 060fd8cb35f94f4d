"""Train a character model on Shakespeare, measure its exact loss, and let it write.

    python train_shakespeare.py                          train for three minutes, then sample
    python train_shakespeare.py --data my.txt            on a text of your own
    python train_shakespeare.py --resume out/last.pt     resume an interrupted run
    python train_shakespeare.py --sample out/best.pt     only sample
    torchrun --nproc-per-node=2 train_shakespeare.py     train in two processes, or on two GPUs

The first 90 % of the text train, the last 10 % are held out. Ctrl-C ends a run early: it is still
saved, evaluated and sampled from. All flags: --help.
"""

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import pathlib
import signal
import sys
import time
import timeit
import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # it is not needed
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

try:
    import rnn
except ValueError as error:  # RNN_KERNEL names a kernel that cannot run here
    sys.exit(f"error: {error}")

# ---- Settings --------------------------------------------------------------------------------

def number(kind, low, high=1e18):
    """The type of a flag: an int or a float, finite, from low to high."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} from {low} to {high:g}, "
                                         f"got {text!r}")
    return convert


def fail(message):
    raise ValueError(message)


size, rate, share = number(int, 1, 1e6), number(float, 0), number(float, 0, 1)
parser = argparse.ArgumentParser(description="Train a character model and sample from it.")
parser.error = fail
add = parser.add_argument
add("--cell", choices=rnn.CELLS, default="lstm", help="default lstm")
add("--layers", type=number(int, 1, 1000), default=1, metavar="N", help="default 1")
add("--hidden", type=size, default=512, metavar="N", help="units per layer, default 512")
add("--embed", type=size, default=64, metavar="N", help="width of the embedding, default 64")
add("--dropout", type=share, default=0.3, metavar="P", help="on each layer's output, default 0.3")
add("--embed-dropout", type=share, default=0.0, metavar="P", help="on the embedding, default 0")
add("--variational", action=argparse.BooleanOptionalAction, default=True,
    help="drop the same units at all steps of a chunk")
add("--batch", type=size, default=16, metavar="N", help="sequences per step, default 16")
add("--context", type=size, default=64, metavar="N", help="characters per sequence, default 64")
add("--lr", type=rate, default=1e-2, help="largest learning rate, default 0.01")
add("--weight-decay", type=rate, default=0.1, metavar="W", help="default 0.1")
add("--seed", type=number(int, 0), default=1, metavar="N", help="random seed, default 1")
add("--dtype", choices=["float32", "bfloat16"], help="default: the faster one on this device")
# A resumed run cannot change these: they are saved in its checkpoints.
FIXED = ("cell", "layers", "hidden", "embed", "dropout", "embed_dropout", "variational",  # model
         "batch", "context", "lr", "weight_decay", "seed", "dtype")
limit = parser.add_mutually_exclusive_group().add_argument
limit("--seconds", type=number(float, 1e-3), metavar="S", help="time of the run, default 180")
limit("--steps", type=number(int, 1), metavar="N", help="length in optimizer steps instead")
add("--patience", type=size, metavar="N", help="end after N evaluations without a new best")
add("--data", metavar="FILE", help="train on this UTF-8 text instead of Shakespeare")
add("--out", metavar="DIR", help="folder for best.pt and last.pt, default out; if another "
                                 "run's are there, DIR-2, DIR-3, ...")
start = parser.add_mutually_exclusive_group().add_argument
start("--resume", metavar="CKPT", help="resume the run of this last.pt")
start("--sample", metavar="CKPT", help="do not train, only sample from this checkpoint")
add("--device", help="default: cuda if there is one, else cpu")
add("--prompt", default="", metavar="TEXT", help="what the sample continues")
add("--length", type=number(int, 0), default=500, metavar="N", help="of the sample, default 500")
add("--temperature", type=rate, default=0.8, metavar="T", help="default 0.8; 0 takes the likeliest")
add("--top-k", type=size, metavar="K", help="draw from the K likeliest symbols only")

EVALS = 10  # evaluations in a run; fewer if they would take over a twentieth of its --seconds
ddp = "RANK" in os.environ  # started by torchrun: several processes train one model together
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
stop = False  # set by Ctrl-C, or when nobody reads the output any more


def fast_dtype(device):
    """bfloat16 if the GPU supports it, or if the CPU, measured for a few milliseconds, multiplies
    matrices clearly faster in it: some CPUs emulate it slowly, others are many times as fast."""
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=7))

    return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


# ---- What the run below needs ----------------------------------------------------------------

def say(message, end="\n"):
    """Print from rank 0. When nobody reads it any more (`| head`), the run ends as by Ctrl-C."""
    global stop
    try:
        if rank == 0:
            print(message, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stop = True


def ctrl_c(number, frame):
    """The first Ctrl-C ends a run cleanly after the current step; a second one immediately."""
    global stop
    if stop:
        raise KeyboardInterrupt
    stop = True


def one_line(kind, error, trace):
    """Print errors that the user can fix as one line, others with a traceback."""
    if issubclass(kind, (ValueError, OSError, FloatingPointError)):
        print("error:", str(error).partition("\n")[0], file=sys.stderr)
    elif kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


def read_text(path):
    """A file's text, byte for byte (line ends stay as they are)."""
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def shakespeare():
    """A text and its name."""
    sys.path.append(str(pathlib.Path(__file__).parent / "tests"))
    try:
        from examples.shakespeare import shakespeare
    except ImportError as error:  # this file was copied alone
        raise ValueError(f"no text ({error}): give one with --data FILE") from error
    return shakespeare()


def measures(loss):
    """A loss in nats in its three usual forms."""
    return f"loss {loss:.4f} ppl {math.exp(min(loss, 99)):.2f} bpc {loss / math.log(2):.3f}"


def evaluate_windows(model, ids, windows=512, length=256):
    """nanoGPT's measure: the mean loss over windows of a text, in nats, each read from a state of
    zeros. Its windows are random, these evenly spread: `windows` or, in a short text, fewer."""
    length, total = min(length, len(ids) - 1), 0.0
    step = max(1, -(-(len(ids) - length) // windows))
    rows = ids.unfold(0, length + 1, step)  # (windows, length + 1)
    with rnn.evaluating(model):
        for part in rows.split(64):
            total += float(rnn.cross_entropy(model(part[:, :-1])[0], part[:, 1:], "sum"))
    return total / rows[:, 1:].numel()


def new_folder(name):
    """The first of the folders name, name-2, name-3, ... without checkpoints. It gets an empty
    last.pt, so that no other run takes it."""
    for k in itertools.count(1):
        out = pathlib.Path(name if k == 1 else f"{name}-{k}")
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            if not (out / "best.pt").exists():
                (out / "last.pt").touch(exist_ok=False)
                return out


def write(model, vocab, args):
    """Print a sample, as the flags say."""
    symbols = rnn.generate(model, vocab, args.prompt, args.length, args.temperature, args.top_k,
                           args.seed)
    say(args.prompt + next(symbols, ""), end="")  # bad flags raise before anything is printed
    for symbol in symbols:
        if stop:
            break
        say(symbol, end="")
    say("")


# ---- The job: settings, text, model, the loop, the result ------------------------------------

if __name__ == "__main__":
    sys.excepthook = one_line
    if sys.stdout is None:
        fail("standard output is closed; to see nothing, send it to /dev/null")
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a symbol
    args = parser.parse_args()
    if args.resume or args.sample:
        model, vocab, kept = rnn.load(args.resume or args.sample)
    if args.resume:
        if not {"config", "optimizer"} <= kept.keys():
            fail(f"cannot resume {args.resume}: it is not the last.pt of a run")
        if args.steps or args.seconds:
            kept["config"].update(steps=None, seconds=None)
        parser.set_defaults(**kept["config"])  # for what is not given
        args = parser.parse_args()
        changed = [f"--{name.replace('_', '-')} {kept['config'][name]}, not {getattr(args, name)}"
                   for name in FIXED if getattr(args, name) != kept["config"][name]]
        if changed:
            fail(f"cannot resume: it was trained with {'; '.join(changed)}")
    args.seconds = args.seconds or (None if args.steps else 180.0)
    warmup = min(200, (args.steps or 2000) // 10)  # steps in which the rate rises

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ddp and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # each process has a GPU of its own
    # A low estimate: weights, gradients, AdamW's two averages, the best weights; activations.
    needed = 20 * args.layers * args.hidden * (args.hidden + args.embed)
    needed += 4 * args.layers * args.hidden * args.batch * args.context // world
    try:
        torch.empty(needed, dtype=torch.uint8, device=device)[0].item()
    except (RuntimeError, AssertionError, TypeError) as error:
        fail(f"--device {device} cannot be used, or lacks {needed:,} bytes for the sizes: {error}")
    args.dtype = args.dtype or fast_dtype(device)
    if ddp and not args.sample:  # to sample takes one process
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        if args.batch % world:
            fail(f"--batch must be a multiple of the {world} processes, got {args.batch}")
        if rank > 0:
            dist.barrier()  # rank 0 downloads and compiles first; the others find the results
    if args.cell == "lstm" and not rnn.fused and rnn.KERNEL != "plain":
        print("compiling csrc/ if it has changed: half a minute", file=sys.stderr, flush=True)
        try:
            rnn.build()
        except (ImportError, RuntimeError) as error:
            if rnn.KERNEL:  # it was asked for
                fail(error)
            print("plain path:", str(error).partition("\n")[0], file=sys.stderr, flush=True)
    if args.sample:
        write(model.to(device), vocab, args)
        sys.exit()
    text, name = (read_text(args.data), args.data) if args.data else shakespeare()
    if ddp and rank == 0:
        dist.barrier()

    began = time.perf_counter()
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if not args.resume:
        vocab = rnn.Vocab.of(text)
        torch.manual_seed(args.seed)
        model = rnn.CharLM(len(vocab), **{name: getattr(args, name) for name in FIXED[:7]})
        rnn.initialize(model)
    elif kept["config"]["sha256"] != digest:
        fail(f"cannot resume: it was trained on a text with sha256 {kept['config']['sha256']}, not "
             f"on {name} ({digest}): give the same text with --data")
    model.to(device)
    ids = vocab.encode(text).to(device)
    split = min(int(0.9 * len(ids)), len(ids) - 2)
    val_ids = ids[split:][: kept["config"]["held_out"] if args.resume else None]
    batches = rnn.Batches(ids[:split], args.batch, args.context)
    optimizer, state = rnn.make_optimizer(model, args.weight_decay), model.init_state(args.batch)
    config = {key: getattr(args, key) for key in (*FIXED, "steps", "seconds", "patience", "data")}
    run = argparse.Namespace(step=0, seconds=0.0, busy=0.0, best=math.inf, stale=0, history=[],
                             weights=model.state_dict())
    if args.resume:
        vars(run).update(kept["run"])
        optimizer.load_state_dict(kept["optimizer"])
        batches.position, state = kept["position"], kept["state"]
    state = rnn.map_state(lambda s: s.chunk(world, dim=1)[rank].to(device), state)
    began -= run.seconds  # as if never interrupted

    list(rnn.generate(model, vocab, args.prompt, min(args.length, 1)))  # a bad prompt fails now
    evaluate_windows(model, val_ids, 64)  # a warm-up
    started = time.perf_counter()
    evaluate_windows(model, val_ids, 64)
    window = (time.perf_counter() - started) / 64
    cost = 2 * len(val_ids) / 256 * window  # of an evaluation, of mostly 1.3 passes
    windows = 512
    if args.seconds:  # on a slow machine, all that is held out could take longer than the run
        windows = max(1, min(windows, int(args.seconds / 10 / window)))
        if not args.resume:
            val_ids = val_ids[: max(2, int(len(val_ids) * args.seconds / 4 / cost))]
            cost = min(cost, args.seconds / 4)
    rest = windows * window + args.length / 1000  # seconds from the last evaluation to the end
    config |= {"sha256": digest, "held_out": len(val_ids)}
    out = pathlib.Path(args.resume or ".").parent
    if rank == 0 and (args.out or not args.resume):
        out = new_folder(args.out or "out")
    fused = args.cell == "lstm" and rnn.fused and (device == "cpu" or rnn.fused.has_cuda)
    params = sum(p.numel() for p in model.parameters())
    say(f"text: {name}, {len(ids):,} characters, {len(vocab)} symbols, sha256 {digest}\n"
        f"evaluated on {len(val_ids):,} of {len(ids) - split:,} held-out characters\n"
        f"config: {config}\nmodel: {params:,} parameters, on {device}, "
        f"{'fused' if fused else 'plain'} path, {world} processes; best.pt and last.pt in {out}")

    def keep():
        """Save all that is needed to resume, in any number of processes. All of them call this."""
        def of_all_rows(part):
            mine = part.cpu().contiguous().view(torch.uint8)  # bytes: gloo knows no bfloat16
            parts = [mine.clone() for _ in range(world)]
            if ddp:
                dist.all_gather(parts, mine)
            return torch.cat(parts, dim=1).view(part.dtype)
        states = rnn.map_state(of_all_rows, state)
        if rank == 0:
            rnn.save(out / "last.pt", model, vocab, config=config, run=vars(run), state=states,
                     optimizer=optimizer.state_dict(), position=batches.position)

    keep()  # if saving fails, then now
    signal.signal(signal.SIGINT, ctrl_c)
    replica = torch.nn.parallel.DistributedDataParallel(model) if ddp else model
    reported = evaluated = time.perf_counter() - began
    recent = []  # losses and gradient norms of the steps since the last report
    # torch.manual_seed seeds all kinds of devices, which takes 2 % of a small step on a CPU.
    reseed = torch.default_generator.manual_seed if device == "cpu" else torch.manual_seed
    while True:
        # Rank 0 has the clock and hears Ctrl-C. It decides for all processes.
        run.seconds = time.perf_counter() - began
        if args.steps:
            done = run.step / args.steps
            due = run.step % max(1, args.steps // EVALS) == 0 or run.step == args.steps
        else:
            done = run.seconds / max(args.seconds / 2, args.seconds - cost - rest)
            due = run.seconds - evaluated > max(args.seconds / EVALS, 19 * cost)
        ended = done >= 1 or stop or run.stale >= (args.patience or math.inf)
        ended = ended and (recent or run.history)  # not before there is something to evaluate
        if ddp:
            news = torch.tensor([run.seconds, done, due, bool(ended)], dtype=torch.float64)
            dist.broadcast(news, 0)
            run.seconds, done, due, ended = news.tolist()

        if recent and (due or ended or run.seconds - reported > 5):
            losses, norms = torch.tensor(recent).unbind(1)  # (steps,) each
            loss, norm = float(losses.mean()), float(norms.max())
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"training stopped at step {run.step}: loss {loss}, "
                                         f"gradient norm {norm}. Try a smaller --lr")
            note = " gradient vanishes" if float(norms.min()) < 1e-6 else ""
            note = " gradient explodes" if norm > 1e3 else note
            took = run.seconds - reported
            left = (args.seconds or run.seconds / done) - run.seconds
            say(f"step {run.step:,} ({left:.0f} s left) {measures(loss)} grad {norm:.2g} "
                f"{len(recent) * args.batch * args.context / took:,.0f} chars/s{note}")
            run.busy, recent, reported = run.busy + took, [], run.seconds
            if ended and not due:
                keep()  # before an evaluation that an uninterrupted run does not make
            if rank == 0 and (due or ended):
                if cost > 4:
                    say(f"evaluating on {len(val_ids):,} characters, about {cost:.0f} s")
                started = time.perf_counter()
                value = rnn.evaluate(model, val_ids)
                cost = time.perf_counter() - started
                say(f"step {run.step:,} held-out {measures(value)}")
                run.history.append((run.step, loss, value))
                run.stale += 1
                if value < run.best:
                    run.best, run.stale = value, 0
                    run.weights = {key: w.clone() for key, w in model.state_dict().items()}
                    rnn.save(out / "best.pt", model, vocab, config=config, history=run.history)
            if due:
                keep()
                reported = evaluated = time.perf_counter() - began
                continue  # patience may have run out
        if ended:
            break

        reseed(args.seed + rank + 1000 * run.step)  # resumed, it drops the same units
        for group in optimizer.param_groups:
            group["lr"] = rnn.learning_rate(args.lr, warmup, run.step, done)
        x, y = (part.chunk(world)[rank] for part in batches.next())  # this process's rows
        optimizer.zero_grad()
        loss, state = rnn.backward(replica, x, y, state, dtype=getattr(torch, args.dtype))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        recent.append((loss, norm))

    stop = False
    if rank == 0:
        model.load_state_dict(run.weights)
        if not (out / "best.pt").exists():  # resumed elsewhere, and nothing better was found
            rnn.save(out / "best.pt", model, vocab, config=config, history=run.history)
        windowed = evaluate_windows(model, val_ids, windows)
        say(f"final val_loss={run.best:.4f} nats bpc={run.best / math.log(2):.4f} "
            f"ppl={math.exp(min(run.best, 99)):.3f} "
            f"chars_per_s={run.step * args.batch * args.context / max(run.busy, 1e-9):.0f} "
            f"seconds={time.perf_counter() - began:.1f} params={params} "
            f"windows_of_{min(256, len(val_ids) - 1)}={windowed:.4f}")
        say(f"sample, from {out}/best.pt at temperature {args.temperature}:")
        write(model, vocab, args)
    if ddp:
        dist.barrier()  # no process leaves while another still talks to it
        os._exit(0)  # torch.distributed's threads abort one ordinary exit in twelve
