"""Models, text, evaluation, sampling and checkpoints of rnn.py."""

import functools
import math
import os
import pickle

import pytest
import torch
from conftest import small, write_checkpoint
from torch import nn

import rnn

TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order


# ---- models ----


@pytest.mark.parametrize("cell", rnn.CELLS)
@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"tie": True, "embed": 12},
                                     {"layers": 2, "dropout": 0.5}], ids=str)
def test_char_lm_shapes_and_carried_state(vocab, ids, cell, options):
    model = small(vocab, cell=cell, **options).double().eval()
    x = ids[:60].view(3, 20)
    whole, end = model(x)
    assert whole.shape == (3, 20, len(vocab))
    first, state = model(x[:, :7], model.init_state(3))
    second, state = model(x[:, 7:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-12, atol=1e-12)
    rnn.map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), state, end)
    if options.get("layers"):
        assert not torch.equal(model.train()(x)[0], whole)  # dropout is at work


@pytest.mark.parametrize("cell", rnn.CELLS)
@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"layers": 2, "dropout": 0.5}], ids=str)
def test_step_by_step_equals_all_at_once(vocab, ids, cell, options):
    model = small(vocab, cell=cell, **options).double().eval()
    x = ids[:60].view(3, 20)
    whole, _ = model(x)
    state = None
    for t in range(20):
        logits, state = model(x[:, t : t + 1], state)
        torch.testing.assert_close(logits[:, 0], whole[:, t], **TIGHT)


def test_char_lm_equals_torch_modules(vocab, ids):
    model = small(vocab).double()
    theirs = nn.LSTM(8, 12, dtype=torch.float64)
    theirs.load_state_dict(model.rnn.state_dict())
    x = ids[:60].view(3, 20)
    expected = model.output(theirs(model.embedding(x.t()))[0]).transpose(0, 1)
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_tied_weights_are_one_parameter(vocab):
    model = small(vocab, tie=True, embed=12)
    assert model.output.weight is model.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == (
        len(vocab) * 12 + len(vocab) + sum(p.numel() for p in model.rnn.parameters()))


@pytest.mark.parametrize("options,message", [
    ({"cell": "elman"}, "one of rnn, lstm, gru, got 'elman'"),
    ({"tie": True}, "embed=64, hidden=256"),
    ({"tie": True, "one_hot": True}, "one_hot=True"),
])
def test_char_lm_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        rnn.CharLM(10, **options)


@pytest.mark.parametrize("shape", [(9,), (2, 3, 4), ()], ids=str)
def test_char_lm_wants_a_batch(shape):
    with pytest.raises((ValueError, IndexError, RuntimeError), match="2D|[Dd]imension"):
        rnn.CharLM(10)(torch.zeros(shape, dtype=torch.long))


def test_variational_dropout_of_a_char_lm(vocab, ids):
    """With all steps alike and nothing carried over, one mask makes all predictions alike."""
    x = torch.full((2, 30), 3)
    for variational in (True, False):
        model = small(vocab, layers=2, cell="rnn", dropout=0.5, variational=variational)
        for name, value in model.named_parameters():
            if "weight_hh" in name:
                nn.init.zeros_(value)
        logits = model(x)[0]
        assert variational == torch.allclose(logits, logits[:, :1].expand_as(logits))
        assert not torch.allclose(logits[0], logits[1])  # each sequence its own
        assert torch.equal(model.eval()(x)[0][0], model(x)[0][1])


def test_dropout_of_the_embedding_is_its_own(vocab, ids):
    """All dropped: of the embedding, then one text is like another; of the output, its bias is
    left."""
    x = ids[:60].view(3, 20)
    blind, deaf = (small(vocab, dropout=1.0 - p, embed_dropout=p).train() for p in (1.0, 0.0))
    assert torch.equal(blind(x)[0], blind(x.flip(0))[0])
    assert torch.equal(deaf(x)[0], deaf.output.bias.expand(3, 20, -1))
    assert not torch.equal(deaf(x)[1][0], deaf(x.flip(0))[1][0])


# ---- text ----


@pytest.mark.parametrize("text", [
    "plain", "tabs\tand\r\nline ends\n\n", "naïve — “quoted” ✓", "日本語テキスト",
    "\U0001f469\u200d\U0001f467 é e\u0301",
    "\x00\x7f\ufeff", "a  b   c\n  d", " leading", "don't; can't -- stop!?", "\ud800 lone",
])
def test_round_trip(text):
    vocab = rnn.Vocab.of(text)
    assert vocab.decode(vocab.encode(text)) == text


def test_vocab_order_words_and_unknown_ones():
    assert rnn.Vocab.of("banana").symbols == ["a", "b", "n"]
    words = rnn.Vocab(["<pad>", "<unk>", "be ", "to "])
    assert words.encode(["to ", "see ", "be "]).tolist() == [3, 1, 2]
    assert words.decode([3, 1, 2]) == "to <unk>be "
    assert len(words) == 4 and rnn.Vocab.of(["b", "a", "b"]).symbols == ["a", "b"]
    assert rnn.Vocab.of("abc").decode(torch.tensor([], dtype=torch.long)) == ""
    assert rnn.Vocab.of("abc").encode("").shape == (0,)


def test_vocab_errors():
    for empty in ("", []):
        with pytest.raises(ValueError, match="at least one symbol"):
            rnn.Vocab.of(empty)
    with pytest.raises(ValueError, match="2 symbols are not in the vocabulary: .*'x', 'é'"):
        rnn.Vocab.of("abc").encode("axébé")
    with pytest.raises(ValueError, match="none of them twice"):
        rnn.Vocab(["a", "a"])


def test_sequential_batches_read_on_and_around():
    ids = torch.arange(23)
    batches = rnn.Batches(ids, batch=2, context=5)
    seen = [batches.next() for _ in range(6)]
    for x, y in seen:
        assert x.shape == y.shape == (2, 5)
        assert torch.equal(y, (x + 1) % 23)
    row = torch.cat([x[0] for x, _ in seen])
    assert torch.equal(row, torch.arange(30) % 23)
    assert seen[0][0][1, 0] == 11  # the second row begins in the middle


def test_random_batches_are_windows_and_repeat_with_the_seed():
    ids = torch.arange(100)
    a, b, c = (rnn.Batches(ids, 4, 9, order="random", seed=s) for s in (1, 1, 2))
    xa, ya = a.next()
    assert torch.equal(ya, xa + 1) and torch.equal(xa[:, 1:], xa[:, :-1] + 1)
    assert torch.equal(xa, b.next()[0]) and not torch.equal(xa, c.next()[0])
    starts = torch.cat([a.next()[0][:, 0] for _ in range(500)])
    assert starts.min() == 0 and starts.max() == 100 - 9 - 1  # every window, the last one too


@pytest.mark.parametrize("arguments,message", [
    ((2, 50), "batch=2, context=50.* 101"),
    ((2, 100, "random"), "batch=2, context=100.* 101"),
    ((0, 5), "batch=0, context=5"), ((2, 0), "context=0"),
    ((2, 5, "shuffled"), "'shuffled'"),
])
def test_batches_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        rnn.Batches(torch.arange(100), *arguments)


# ---- evaluation ----


class Fixed(nn.Module):
    """Gives the same logits to every symbol: its loss can be worked out by hand."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def init_state(self, batch):
        return torch.zeros(1, batch, 1)

    def forward(self, ids, state):
        return self.logits.expand(*ids.shape, -1), state


def test_evaluate_by_hand():
    """p(a) = 1/2, p(b) = 1/4, p(c) = 1/4; predicted are b, c, a, a, a: 2 + 2 + 1 + 1 + 1 bits."""
    model = Fixed([math.log(2), 0.0, 0.0])
    for batch in (1, 2, 5, 64):
        loss = rnn.evaluate(model, torch.tensor([0, 1, 2, 0, 0, 0]), batch=batch)
        assert loss == pytest.approx(7 / 5 * math.log(2), rel=1e-6)


def test_perplexity_of_a_uniform_model_is_v():
    assert rnn.perplexity(Fixed([0.0] * 17), torch.arange(17)) == pytest.approx(17, rel=1e-6)


@pytest.mark.parametrize("cell", rnn.CELLS)
@pytest.mark.parametrize("keep", [0.0, 8.0], ids=["forgets", "remembers"])
def test_evaluate_does_not_depend_on_batch_or_context(vocab, ids, cell, keep):
    """One pass over the whole text against pieces side by side; also with a forget or update gate
    so far open, sigmoid(8) = 0.9997, that a state outlives its piece."""
    model = small(vocab, cell=cell).double()
    with torch.no_grad():
        if cell != "rnn":
            model.rnn.bias_ih_l0[12:24] += keep
        logits, _ = model(ids[None, :-1])
        expected = nn.functional.cross_entropy(logits[0], ids[1:]).item()
    for batch, context in ((1, 1000), (1, 7), (5, 16), (32, 256), (10**6, 256)):
        assert rnn.evaluate(model, ids, batch, context) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_evaluate_reads_nothing_but_the_text():
    """Filled-up pieces must not count: reading symbol 0, which the text lacks, this state explodes,
    and beside it the others' differences would look like nothing."""
    model = rnn.CharLM(3, hidden=2, one_hot=True, cell="rnn")
    model.rnn.nonlinearity = "relu"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.rnn.weight_hh_l0.copy_(torch.tensor([[1.5, 0.0], [0.0, 0.999]]))
        model.rnn.weight_ih_l0.copy_(torch.tensor([[1.0, -9.0, -9.0], [0.0, 0.02, 0.0]]))
        model.output.weight[1, 1] = 1.0
    ids = torch.randint(1, 3, (1986,))
    one = rnn.evaluate(model, ids, batch=1)
    for batch in (2, 40, 64, 1000, 5000):
        assert rnn.evaluate(model, ids, batch) == pytest.approx(one, rel=1e-5), batch


def test_evaluate_wrong_arguments(vocab):
    for ids, batch, context in ((0, 64, 256), (1, 64, 256), (5, 0, 256), (5, 64, 0)):
        with pytest.raises(ValueError, match=f"{batch=}.*{context=}"):
            rnn.evaluate(small(vocab), torch.zeros(ids, dtype=torch.long), batch, context)


def test_evaluate_sees_states_however_small():
    """A cell that never forgets, and an output that makes much of its tiny state."""
    torch.manual_seed(0)
    ids = torch.randint(5, (400,))
    model = rnn.CharLM(5, embed=4, hidden=4, cell="rnn").double()
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(torch.eye(4))
        model.rnn.weight_ih_l0 *= 4e-6
        model.rnn.bias_ih_l0.zero_(), model.rnn.bias_hh_l0.zero_()
        model.output.weight *= 1e5
    values = [rnn.evaluate(model, ids, batch, 16) for batch in (1, 8, 64)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-3)


# ---- sampling ----


def write(model, vocab, prompt, length, **options):
    return "".join(rnn.generate(model, vocab, prompt, length, **options))


def test_generate(vocab, text):
    model = small(vocab)
    one = write(model, vocab, "Ann", 40, seed=3)
    assert len(one) == 40
    assert one == write(model, vocab, "Ann", 40, seed=3)
    assert one != write(model, vocab, "Ann", 40, seed=4)
    greedy = write(model, vocab, "Ann", 40, temperature=0)
    assert greedy == write(model, vocab, "Ann", 40, temperature=1e-320)
    assert greedy == write(model, vocab, "Ann", 40, top_k=1)
    assert greedy == write(model, vocab, "Ann", 40, temperature=1e-30)
    assert len(write(model, vocab, "", 10)) == 10
    assert write(model, vocab, "Ann", 0) == ""
    assert write(model, vocab, "Ann", 40, seed=3, top_k=10**6) == one
    assert model.training


def test_generate_yields_symbols_as_they_come(vocab, text):
    """One after the other, so the model may be read, or trained, in between."""
    model = small(vocab)
    symbols = rnn.generate(model, vocab, "Ann", 40, seed=3)
    first = [next(symbols) for _ in range(10)]
    assert model.training and torch.is_grad_enabled()
    model(torch.zeros(1, 2, dtype=torch.long))[0].sum().backward()
    assert "".join([*first, *symbols]) == write(model, vocab, "Ann", 40, seed=3)


def test_generate_words():
    vocab = rnn.Vocab(["<unk>", "be ", "to "])
    model = small(vocab)
    assert set(rnn.generate(model, vocab, ["to ", "be ", "or "], 50, seed=1)) <= set(vocab.symbols)


def test_generate_is_the_model_s_own_distribution(vocab):
    """Sampling with a carried state equals reading the whole prefix again every time."""
    model = small(vocab).eval()
    random = torch.Generator().manual_seed(7)

    def greedy(logits):
        return logits.argmax()

    def draw(logits):
        return torch.multinomial((logits.double() / 2).softmax(-1), 1, generator=random)

    for choose, options in ((greedy, {"temperature": 0}), (draw, {"temperature": 2, "seed": 7})):
        written = "Ann"
        for _ in range(20):
            logits, _ = model(vocab.encode(written)[None])  # (1, T, V)
            written += vocab.symbols[choose(logits[0, -1])]
        assert written == "Ann" + write(model, vocab, "Ann", 20, **options)


def test_generate_leaves_the_global_random_numbers_alone(vocab):
    model = small(vocab, dropout=0.5)
    before = torch.get_rng_state()
    for seed in (None, 5):
        write(model, vocab, "Ann", 5, seed=seed)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arguments,message", [
    ({"temperature": -1}, "temperature must be 0 or more and finite.* got temperature=-1"),
    ({"temperature": math.nan}, "=nan"), ({"temperature": math.inf}, "=inf"),
    ({"top_k": 0}, "top_k at least 1; .*top_k=0"), ({"length": -1}, "length=-1"),
    ({"prompt": "Zoë"}, "2 symbols are not in the vocabulary: .*'Z', 'ë'"),
])
def test_generate_wrong_arguments(vocab, arguments, message):
    model = small(vocab)
    with pytest.raises(ValueError, match=message):
        next(rnn.generate(model, vocab, **arguments))
    assert model.training  # as it was


# ---- checkpoints ----


@pytest.mark.parametrize("options", [{"layers": 2, "cell": "gru"}, {"tie": True, "embed": 12}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(vocab, tmp_path, options, dtype):
    model = small(vocab, **options).to(dtype)
    rnn.save(tmp_path / "a.pt", model, vocab, note=[1, "two"])
    again, again_vocab, training = rnn.load(tmp_path / "a.pt")
    assert again.config == model.config and again_vocab.symbols == vocab.symbols
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert training == {"note": [1, "two"]} and os.listdir(tmp_path) == ["a.pt"]


def test_load_keeps_every_type(vocab, tmp_path):
    model = small(vocab)
    model.embedding.bfloat16()
    model.output.double()
    rnn.save(tmp_path / "a.pt", model, vocab)
    again = rnn.load(tmp_path / "a.pt")[0].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value) and again[name].dtype == value.dtype, name


def test_damaged_and_foreign_checkpoints(vocab, tmp_path):
    path, bad = tmp_path / "a.pt", tmp_path / "bad.pt"
    rnn.save(path, small(vocab), vocab)
    whole = path.read_bytes()
    for tenth in range(10):
        bad.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ValueError, match="bad.pt is damaged"):
            rnn.load(bad)
    content = torch.load(path)
    for change in ({"symbols": ["a"]}, {"symbols": ["a"] * len(vocab)}, {"weights": {}},
                   {"config": {**content["config"], "hidden": 13}},
                   {"config": {**content["config"], "cell": "transformer"}}):
        write_checkpoint({**content, **change}, bad)
        with pytest.raises(ValueError, match="bad.pt is damaged .*: (?!.*checksum)"):
            rnn.load(bad)
    for foreign in ([1, 2], {"model": content["weights"]}, small(vocab).state_dict()):
        for write in (torch.save, write_checkpoint):
            write(foreign, bad)
            with pytest.raises(ValueError, match="is damaged"):
                rnn.load(bad)
    with pytest.raises(FileNotFoundError):
        rnn.load(tmp_path / "missing.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in (torch.save, functools.partial(pickle.dump, protocol=2)):
        write_checkpoint({"config": Payload()}, tmp_path / "evil.pt", save)
        with pytest.raises(ValueError, match="is damaged .*: .*[Ww]eights.only"):
            rnn.load("evil.pt")
    assert not os.path.exists("executed")


def test_an_interrupted_save_keeps_the_old_checkpoint(vocab, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    rnn.save(path, small(vocab), vocab, version=1)

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*a\.pt.*No space"):
        rnn.save(path, small(vocab), vocab, version=2)
    monkeypatch.undo()
    assert rnn.load(path)[2] == {"version": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_a_folder_that_cannot_be_written(vocab, tmp_path):
    with pytest.raises(OSError, match="cannot write the checkpoint"):
        rnn.save(tmp_path / "no" / "a.pt", small(vocab), vocab)
