"""The page that shows what cells do, from examples/page.py: its numbers, its text, its errors."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small
from examples import page

import rnn
import train_shakespeare


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    """A folder with a text, and a model with the record that train_shakespeare.py keeps."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text(text)
    (folder / "short.txt").write_text("to be or\nx")
    (folder / "other.txt").write_text("To be, or not to be. " * 200)
    (folder / "latin.txt").write_bytes("Zoë".encode("latin-1") * 2000)
    make_checkpoint(folder / "best.pt", text)
    return folder


def make_checkpoint(path, text, **options):
    """Thirty steps on a text, evaluated after every third."""
    vocab = rnn.Vocab.of(text)
    ids, history = vocab.encode(text), []
    model = small(vocab, **options)
    for step, loss, _ in rnn.train(model, rnn.Batches(ids, batch=4, context=16), 30):
        if step % 3 == 0:
            history.append((step, loss, rnn.evaluate(model, ids[-200:])))
    config = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    rnn.save(path, model, vocab, config=config, history=history)
    return history


def read_page(path):
    """A page's source and the data in it."""
    source = path.read_text()
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.S)
    assert len(data) == 1
    return source, json.loads(data[0])


def test_features_of_a_text():
    text = ('ANN:\nWho is "he"? I see\n\'Tis he: \'Come, o\'er there!\' said\n\nBob said:\nNo.')
    found = page.features(text)

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
def test_a_page_shows_what_the_cells_do(tmp_path, monkeypatch, capsys, cell, gate):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"<b>{n}</b></script>:\n{n} sees {n} & {n}.\n\n" for n in ("Ann", "Bob") * 400)
    (tmp_path / "tags.txt").write_text(text)
    history = make_checkpoint("tags.pt", text, cell=cell, layers=2)
    page.main(["tags.pt", "p.html", "--data", "tags.txt"])
    assert capsys.readouterr().out == "page: p.html\n"
    source, data = read_page(tmp_path / "p.html")
    begin = text.index(data["text"][:60], int(0.9 * len(text)))
    assert text[begin:].startswith(data["text"]) and len(data["text"]) > 500
    assert "<b>Ann" not in source
    assert "reads the last tenth of tags.txt, which it was not trained on." in source
    assert not re.search(r"""(src|href|url)\W*[=(]|https?:|@import""", source)  # needs nothing else
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source
    names = [view["name"] for view in data["views"]]
    assert {"position in the line", "letters of the word so far", "surprise"} <= set(names)
    assert "Too rare in this text to tell: inside quotes" in source
    assert (f"openness of the {gate} gate" in names) == (gate is not None)
    assert ("This network has no gate to show" in source) == (gate is None)
    for view in data["views"]:
        assert len(view["values"]) == len(data["text"])
        assert all(-1 <= v <= 1 for v in view["values"]) or view["name"] == "surprise"
        if "openness" in view["name"]:
            assert re.search(r"On average 0\.\d\d at letters, 0\.\d\d at spaces", view["note"])
    assert source.count("<polyline") == 2 and source.count("<circle") == 2 * 10
    for step, loss, held_out in history:
        assert f"step {step:,}: training loss {loss:.4f} nats" in source
        assert f"step {step:,}: held-out loss {held_out:.4f} nats" in source


def test_a_pages_cell_is_the_one_that_was_planted():
    """Of three cells the second counts letters, with noise and a minus; the page finds it."""
    text = "one two, three four. " * 100
    found = page.features(text)
    letters = torch.tensor(found["letters of the word so far"]).float()
    cells = torch.stack((torch.randn(len(text)), 0.3 * torch.randn(len(text)) - letters,
                         torch.randn(len(text))), dim=1)
    chosen, rare = page.choose(cells, found)
    assert chosen[0][:2] == ("letters of the word so far", 1) and -1 < chosen[0][2] < -0.95
    assert set(rare) == {"inside quotes", "inside a speaker's name", "inside a question"}


def test_what_the_page_hears_is_what_the_network_does(folder, text):
    model, vocab, _ = rnn.load(folder / "best.pt")
    ids = vocab.encode(text)[:1500]  # more than one piece
    cells, gate, surprise = page.listen(model, ids)
    with torch.no_grad():
        _, _, traces = model.rnn.trace(model.embedding(ids[:, None]))
        torch.testing.assert_close(cells, traces[0]["c"][:, 0].tanh())
        torch.testing.assert_close(gate, traces[0]["f"].mean((1, 2)))
        logp = model(ids[None])[0][0].log_softmax(-1)  # (T, V)
        torch.testing.assert_close(surprise[1:], -logp[range(len(ids) - 1), ids[1:]])
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
    cells, gate, surprise = page.listen(rnn.CharLM(5, hidden=3, cell="closed"), ids)
    assert cells.shape == (40, 3) and gate is None and surprise.shape == (40,)


def test_a_page_of_a_checkpoint_without_a_record(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model, vocab, _ = rnn.load("best.pt")
    rnn.save("young.pt", model, vocab)
    page.main(["young.pt", "young.html", "--data", "text.txt"])
    source, _ = read_page(folder / "young.html")
    assert "fewer than two evaluations" in source and "not the text it was trained on" in source


def test_a_page_of_a_run_of_train_shakespeare(folder):
    """best.pt and last.pt, as the script writes them."""
    script = str(ROOT / "train_shakespeare.py")
    flags = "--data text.txt --out run --steps 20 --hidden 16 --embed 8 --batch 4 --context 16"
    done = subprocess.run([sys.executable, script, *flags.split()], cwd=folder, text=True,
                          env={**os.environ, "RNN_KERNEL": "plain"}, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("best", "last"):
        page.main([str(folder / "run" / f"{name}.pt"), str(folder / "run.html"), "--data",
                   str(folder / "text.txt")])
        source, _ = read_page(folder / "run.html")
        assert "text.txt, which it was not trained on." in source
        assert source.count("<polyline") == 2


def test_a_page_takes_shakespeare_unless_told_otherwise(folder, monkeypatch, text):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_shakespeare, "shakespeare", lambda: (text, "the plays"))
    page.main(["best.pt", "default.html"])
    source, _ = read_page(folder / "default.html")
    assert "reads the last tenth of the plays, which it was not trained on." in source


@pytest.mark.parametrize("arguments,message", [
    (["none.pt", "x.html", "--data", "text.txt"], "none.pt"),
    (["best.pt", "x.html", "--data", "none.txt"], "none.txt"),
    (["best.pt", "x.html", "--data", "other.txt"], "not in the vocabulary: "),
    (["best.pt", "x.html", "--data", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["best.pt", "x.html", "--data", "short.txt"],
     "two characters or more in the last tenth of the text, but short.txt has 1 there"),
    (["best.pt", "none/x.html", "--data", "text.txt"], "No such file or directory: 'none/x.html'"),
    (["best.pt", ".", "--data", "text.txt"], "Is a directory: '.'"),
    (["text.txt", "x.html", "--data", "text.txt"], "text.txt is damaged or not a checkpoint"),
    (["words.pt", "x.html", "--data", "text.txt"],
     "expected a model of characters, but words.pt has the symbol 'two'"),
])
def test_a_page_that_cannot_be_made_is_one_clear_error(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    model, vocab, _ = rnn.load("best.pt")
    rnn.save("words.pt", model, rnn.Vocab([*vocab.symbols[:-1], "two"]))
    with pytest.raises((ValueError, OSError), match=message):
        page.main(arguments)
    assert not (folder / "x.html").exists()


def test_the_page_s_error_is_one_line(folder):
    script = str(ROOT / "tests" / "examples" / "page.py")
    done = subprocess.run([sys.executable, script, "none.pt", "x.html"], cwd=folder, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*none\.pt'?\n", done.stderr)
