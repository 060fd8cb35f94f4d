"""Models, text, evaluation, sampling and checkpoints of rnn.py."""

import io
import itertools
import math
import os
import pickle

import pytest
import torch
from cells import LayerNormLSTM, PeepholeLSTM
from conftest import small
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

import rnn

CELLS = ["lstm", "gru", "rnn"]
OWN = {"peephole": PeepholeLSTM, "lnlstm": LayerNormLSTM}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order


@pytest.fixture
def own_cells(monkeypatch):
    monkeypatch.setattr(rnn, "CELLS", rnn.CELLS | OWN)


# ---- models ----


@pytest.mark.parametrize("cell", CELLS)
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


@pytest.mark.parametrize("cell", [*rnn.CELLS, *OWN])
@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"layers": 2, "dropout": 0.5}], ids=str)
def test_step_by_step_equals_all_at_once(own_cells, vocab, ids, cell, options):
    model = small(vocab, cell=cell, **options).double().eval()
    x = ids[:60].view(3, 20)
    whole, _ = model(x)
    step = model.stepper(model.init_state(3))
    for t in range(20):
        torch.testing.assert_close(step(x[:, t]), whole[:, t], **TIGHT)


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
    ({"cell": "elman"}, "one of rnn, lstm, gru, original_gru, got 'elman'"),
    ({"tie": True}, "embed=64, hidden=256"),
    ({"tie": True, "one_hot": True}, "one_hot=True"),
])
def test_char_lm_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        rnn.CharLM(10, **options)


def test_char_lm_wants_a_batch():
    with pytest.raises(ValueError, match=r"2D, \(B, T\), got 1D"):
        rnn.CharLM(10)(torch.zeros(9, dtype=torch.long))


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


# ---- classifier ----

LENGTHS = [5, 1, 7, 3]


def sentences(vocab_size=11):
    """Four random sequences: padded, with an 8th column of nothing but padding, and as a list."""
    torch.manual_seed(1)
    each = [torch.randint(3, vocab_size, (n,)) for n in LENGTHS]
    ids, lengths = rnn.pad(each)
    return nn.functional.pad(ids, (0, 1)), lengths, each


@pytest.mark.parametrize("cell", [*rnn.CELLS, *OWN])
@pytest.mark.parametrize("options", [{}, {"layers": 2, "bidirectional": True},
                                     {"one_hot": True, "classes": 5}], ids=str)
def test_classifier_reads_no_padding(own_cells, cell, options):
    """Padded and packed, every sequence has the logits that it has alone, and no others matter."""
    model = rnn.Classifier(11, embed=4, hidden=6, cell=cell, **options).double()
    ids, lengths, each = sentences()
    logits = model(ids, lengths)
    assert logits.shape == (4, options.get("classes", 2))
    alone = torch.cat([model(x[None]) for x in each])
    torch.testing.assert_close(logits, alone, **TIGHT)
    other = torch.where(torch.arange(8) < lengths[:, None], ids, 7)  # other padding
    torch.testing.assert_close(model(other, lengths), logits, **TIGHT)


def test_classifier_equals_torch_modules():
    model = rnn.Classifier(11, embed=4, hidden=6, layers=2, bidirectional=True).double()
    theirs = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(model.rnn.state_dict())
    ids, lengths, each = sentences()
    for x, logits in zip(each, model(ids, lengths)):
        output = theirs(model.embedding(x[None]))[0][0]  # (T, 12)
        last = torch.cat((output[-1, :6], output[0, 6:]))  # each direction's own last step
        torch.testing.assert_close(logits, model.output(last), **TIGHT)


def test_two_logits_are_one():
    """The difference of the two, under torch's loss for a single logit."""
    model = rnn.Classifier(11, embed=4, hidden=6).double()
    ids, lengths, _ = sentences()
    logits, targets = model(ids, lengths), torch.tensor([0, 1, 1, 0])
    one = nn.functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0],
                                                         targets.double())
    torch.testing.assert_close(nn.functional.cross_entropy(logits, targets), one, **TIGHT)


def test_padding_has_no_vector_and_learns_none():
    model = rnn.Classifier(11, embed=4, hidden=6)
    assert not model.embedding.weight[rnn.PAD].any()
    model(sentences()[0]).sum().backward()  # unpacked: the padding is read, as zeros
    assert not model.embedding.weight.grad[rnn.PAD].any() and model.embedding.weight.grad.any()


def test_classifier_dropout():
    model = rnn.Classifier(11, embed=4, hidden=6, layers=2, dropout=0.5)
    ids, lengths, _ = sentences()
    assert not torch.equal(model(ids, lengths), model(ids, lengths))
    assert torch.equal(model.eval()(ids, lengths), model(ids, lengths))


@pytest.mark.parametrize("lengths", [[0, 1, 7, 3], [9, 1, 7, 3], [5, 1, 7]], ids=str)
def test_wrong_lengths(lengths):
    ids = sentences()[0]
    with pytest.raises(ValueError, match=r"4 numbers from 1 to 8, got \[" + str(lengths[0])):
        rnn.Classifier(11)(ids, torch.tensor(lengths))


def test_models_of_wrong_cells():
    for model in (rnn.Classifier, rnn.Seq2Seq):
        with pytest.raises(ValueError, match="got 'elman'"):
            model(11, cell="elman")
    with pytest.raises(ValueError, match="hidden must be even, half for each direction, got 7"):
        rnn.Seq2Seq(11, hidden=7)


@pytest.mark.parametrize("model", [rnn.Classifier, rnn.Seq2Seq])
def test_save_and_load_of_the_other_models(model, tmp_path):
    vocab = rnn.Vocab.of("abcdefgh", specials=rnn.SPECIALS)
    one = model(len(vocab), embed=4, hidden=6, layers=2, cell="gru", dropout=0.1)
    rnn.save(tmp_path / "a.pt", one, vocab)
    again, again_vocab, _ = rnn.load(tmp_path / "a.pt")
    assert type(again) is model and again.config == one.config
    assert again_vocab.symbols[:3] == rnn.SPECIALS
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), one.parameters()))


# ---- encoder and decoder ----


def translator(cell="lstm", **options):
    torch.manual_seed(0)
    model = rnn.Seq2Seq(11, **{"embed": 4, "hidden": 6, "cell": cell, **options}).double()
    with torch.no_grad():
        model.output.weight *= 5  # predictions that are not all alike
    return model


@pytest.mark.parametrize("cell", [*rnn.CELLS, *OWN])
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_never_leaks_into_a_translation(own_cells, cell, layers):
    model = translator(cell, layers=layers)
    ids, lengths, each = sentences()
    target = torch.tensor([[rnn.BOS, 4, 5, 6]] * 4)
    logits, weights = model(ids, lengths, target)
    assert logits.shape == (4, 4, 11) and weights.shape == (4, 4, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 4, dtype=torch.float64), **TIGHT)
    for b, x in enumerate(each):
        alone, looks = model(x[None], [len(x)], target[:1])
        torch.testing.assert_close(logits[b], alone[0], **TIGHT)
        torch.testing.assert_close(weights[b, :, :len(x)], looks[0], **TIGHT)
        assert not weights[b, :, len(x):].any()
    for beam in (1, 3):
        ids_out, logp, _ = model.translate(ids, lengths, beam, 6)
        for b, x in enumerate(each):
            alone, one, _ = model.translate(x[None], [len(x)], beam, 6)
            n = alone.shape[1]
            assert torch.equal(ids_out[b, :n], alone[0]) and (ids_out[b, n:] == rnn.EOS).all()
            torch.testing.assert_close(logp[b], one[0], **TIGHT)


def test_attention_and_start_equal_torch_modules():
    """The encoder's states and the decoder's from nn.LSTM, the attention written out."""
    model = translator(layers=2)
    encoder = nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    decoder = nn.LSTM(4, 6, 2, batch_first=True, dtype=torch.float64)
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    x, y = torch.tensor([[5, 3, 8]]), torch.tensor([[rnn.BOS, 4]])
    memory, state = encoder(model.embedding(x))
    start = tuple(torch.stack([torch.cat((s[2 * k], s[2 * k + 1]), -1) for k in (0, 1)])
                  for s in state)
    q = decoder(model.embedding(y), start)[0]
    logits, weights = model(x, [3], y)
    for m in range(2):
        scores = torch.stack([model.query.weight @ q[0, m] @ memory[0, t] for t in range(3)])
        expected = torch.softmax(scores, 0)
        torch.testing.assert_close(weights[0, m], expected, **TIGHT)
        context = sum(expected[t] * memory[0, t] for t in range(3))
        h = torch.tanh(model.mix(torch.cat((q[0, m], context))))
        torch.testing.assert_close(logits[0, m], model.output(h), **TIGHT)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_beam_of_one_is_greedy(cell):
    """One symbol at a time through `forward`, which reads the whole target again every time."""
    model = translator(cell)
    ids, lengths, _ = sentences()
    result, logp, weights = model.translate(ids, lengths, beam=1, length=6)
    for b in range(4):
        target, expected = [rnn.BOS], 0.0
        while len(target) <= 6 and target[-1] != rnn.EOS:
            logits, looks = model(ids[b : b + 1], lengths[b : b + 1], torch.tensor([target]))
            scores = logits[0, -1].log_softmax(-1)
            expected += scores.max().item()
            target.append(scores.argmax().item())
        n = len(target) - 1
        assert result[b, :n].tolist() == target[1:] and (result[b, n:] == rnn.EOS).all()
        assert logp[b].item() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(weights[b, :n], looks[0], **TIGHT)


def test_a_beam_of_full_width_finds_the_likeliest():
    """All targets of up to 3 of 5 symbols, one after the other; greedy misses some of the best."""
    torch.manual_seed(4)
    model = rnn.Seq2Seq(5, embed=4, hidden=6).double()
    with torch.no_grad():
        model.output.weight *= 8
    ids, lengths = rnn.pad([torch.randint(3, 5, (n,)) for n in (1, 2, 3, 4, 5, 6)])
    result, logp, _ = model.translate(ids, lengths, beam=5**3, length=3)
    greedy = model.translate(ids, lengths, beam=1, length=3)[1]
    assert (greedy < logp - 1e-6).any() and (greedy <= logp + 1e-12).all()
    for b in range(len(ids)):
        best = (-math.inf, None)
        for target in itertools.product(range(5), repeat=3):
            if rnn.EOS in target:
                target = target[: target.index(rnn.EOS) + 1]
            read = torch.tensor([[rnn.BOS, *target[:-1]]])
            logits = model(ids[b : b + 1], lengths[b : b + 1], read)[0][0].log_softmax(-1)
            best = max(best, (sum(row[s].item() for row, s in zip(logits, target)), target))
        assert logp[b].item() == pytest.approx(best[0], rel=1e-12)
        assert tuple(result[b].tolist())[: len(best[1])] == best[1]


def test_translation_ends_early_and_leaves_the_model_as_it_was():
    model = translator()
    with torch.no_grad():
        model.output.bias[rnn.EOS] = 100
    ids, lengths, _ = sentences()
    result, logp, weights = model.translate(ids, lengths, beam=2)
    assert result.tolist() == [[rnn.EOS]] * 4 and weights.shape == (4, 1, 8)
    assert model.training and not logp.requires_grad
    for beam, length in ((0, 5), (1, 0)):
        with pytest.raises(ValueError, match=f"got {beam} and {length}"):
            model.translate(ids, lengths, beam, length)


# ---- helpers ----


def test_pad_and_back():
    ids, lengths, each = sentences()
    assert lengths.tolist() == LENGTHS and rnn.pad([[1, 2], [3]])[0].tolist() == [[1, 2], [3, 0]]
    packed = rnn.pack(ids[..., None], lengths)
    again, sizes = pad_packed_sequence(packed, batch_first=True)
    assert torch.equal(again[..., 0], ids[:, :7]) and torch.equal(sizes, lengths)
    assert torch.equal(rnn.pad(each, value=9)[0] == 9, ids[:, :7] == 0)
    empty = rnn.pad([[1, 2], []])
    assert empty[0].tolist() == [[1, 2], [0, 0]] and empty[1].tolist() == [2, 0]


def test_buckets_are_an_epoch_of_similar_lengths():
    lengths = torch.randint(1, 100, (1000,))
    epoch = rnn.buckets(lengths, 32)
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(1000))
    assert sorted(len(rows) for rows in epoch) == [8] + [32] * 31
    padded = sum(int(lengths[rows].max()) * len(rows) for rows in epoch)
    assert padded < 1.05 * lengths.sum() < 1.5 * padded  # 32 in a row at random: about 1.9 times
    tops = [int(lengths[rows].max()) for rows in epoch]
    assert tops != sorted(tops)
    assert not torch.equal(epoch[0], rnn.buckets(lengths, 32)[0])


def test_accuracy():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert rnn.accuracy(logits, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3, rel=1e-12)
    assert rnn.accuracy(logits[None], torch.tensor([[1, 0, 1]])) == 1.0


# ---- text ----


@pytest.mark.parametrize("text", [
    "plain", "tabs\tand\r\nline ends\n\n", "naïve — “quoted” ✓", "日本語テキスト",
    "\U0001f469\u200d\U0001f467 é e\u0301",
    "\x00\x7f\ufeff", "a  b   c\n  d", " leading", "don't; can't -- stop!?", "\ud800 lone",
])
@pytest.mark.parametrize("words", [False, True])
def test_round_trip(text, words):
    vocab = rnn.Vocab.of(text, words=words)
    assert vocab.decode(vocab.encode(text)) == text


def test_vocab_order_specials_and_max_size():
    assert rnn.Vocab.of("banana").symbols == ["a", "b", "n"]
    words = rnn.Vocab.of("to be or not to be, to be", words=True, max_size=4, specials=("<pad>",))
    assert words.symbols == ["<pad>", "<unk>", " be", " to"]
    assert words.decode(words.encode("x to be")) == "<unk> to be"
    assert len(rnn.Vocab.of("banana", max_size=3)) == 3  # nothing to cut, no "<unk>" needed


def test_vocab_errors():
    with pytest.raises(ValueError, match="empty text"):
        rnn.Vocab.of("")
    with pytest.raises(ValueError, match="2 symbols are not in the vocabulary: 'x', 'é'"):
        rnn.Vocab.of("abc").encode("axébé")
    with pytest.raises(ValueError, match="max_size=1 leaves no room"):
        rnn.Vocab.of("abc", max_size=1)
    with pytest.raises(TypeError, match="the str '<pad>'"):
        rnn.Vocab.of("abc", specials="<pad>")
    with pytest.raises(ValueError, match="twice"):
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
    ((2, 50), "a text of 100 symbols is too short: batch=2, context=50 .* need 101"),
    ((2, 100, "random"), "a text of 100 symbols is too short: .* in random order need 101"),
    ((0, 5), "at least 1, got 0 and 5"), ((2, 5, "shuffled"), "got 'shuffled'"),
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


@pytest.mark.parametrize("cell", CELLS)
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
    for ids, batch, context in ((1, 64, 256), (5, 0, 256), (5, 64, 0)):
        with pytest.raises(ValueError, match=f"got {ids}, {batch} and {context}"):
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


def test_generate(vocab, text):
    model = small(vocab)
    one = rnn.generate(model, vocab, "Ann", 40, seed=3)
    assert one.startswith("Ann") and len(one) == 43
    assert one == rnn.generate(model, vocab, "Ann", 40, seed=3)
    assert one != rnn.generate(model, vocab, "Ann", 40, seed=4)
    greedy = rnn.generate(model, vocab, "Ann", 40, temperature=0)
    assert greedy == rnn.generate(model, vocab, "Ann", 40, temperature=1e-320)
    assert greedy == rnn.generate(model, vocab, "Ann", 40, top_k=1)
    assert greedy == rnn.generate(model, vocab, "Ann", 40, temperature=1e-30)
    assert len(rnn.generate(model, vocab, "", 10)) == 10
    assert rnn.generate(model, vocab, "Ann", 0) == "Ann"
    assert rnn.generate(model, vocab, "Ann", 40, seed=3, top_k=10**6) == one
    stream = io.StringIO()
    assert rnn.generate(model, vocab, "Ann", 40, seed=3, stream=stream) == stream.getvalue()
    assert model.training


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
        assert written == rnn.generate(model, vocab, "Ann", 20, **options)


def test_generate_leaves_the_global_random_numbers_alone(vocab):
    before = torch.get_rng_state()
    rnn.generate(small(vocab), vocab, "Ann", 5)
    torch.manual_seed(0)
    rnn.generate(small(vocab), vocab, "Ann", 5)
    after_init = torch.get_rng_state()
    small(vocab)
    assert torch.equal(after_init, torch.get_rng_state()) and before is not None


@pytest.mark.parametrize("arguments,message", [
    ({"temperature": -1}, "temperature must be 0 or more, and finite, got -1"),
    ({"temperature": math.nan}, "got nan"), ({"temperature": math.inf}, "got inf"),
    ({"top_k": 0}, "top_k at least 1, got 500 and 0"), ({"length": -1}, "got -1 and None"),
    ({"prompt": "Zoë"}, "2 symbols are not in the vocabulary: 'Z', 'ë'"),
])
def test_generate_wrong_arguments(vocab, arguments, message):
    model = small(vocab)
    with pytest.raises(ValueError, match=message):
        rnn.generate(model, vocab, **arguments)
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


def test_load_keeps_every_type(vocab, tmp_path, monkeypatch):
    class Counting(rnn.CharLM):
        def __init__(self, vocab_size, embed=4, hidden=8):
            super().__init__(vocab_size, embed, hidden)
            self.config = {"vocab_size": vocab_size}
            self.register_buffer("seen", torch.tensor(7))

    monkeypatch.setitem(rnn.MODELS, "Counting", Counting)
    model = Counting(len(vocab))
    model.embedding.bfloat16()
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
        with pytest.raises(ValueError, match="bad.pt is damaged or not a checkpoint"):
            rnn.load(bad)
    content = torch.load(path)
    for change in ({"format": "nanoGPT"}, {"kind": "Transformer"}, {"symbols": ["a"]},
                   {"config": {**content["config"], "hidden": 13}}):
        torch.save({**content, **change}, bad)
        with pytest.raises(ValueError, match="bad.pt is damaged or not a checkpoint"):
            rnn.load(bad)
    torch.save([1, 2], bad)
    with pytest.raises(ValueError, match="not a checkpoint"):
        rnn.load(bad)
    with pytest.raises(FileNotFoundError):
        rnn.load(tmp_path / "missing.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("evil.pt", "wb") as file:
        pickle.dump({"format": Payload()}, file, protocol=2)
    torch.save({"format": Payload()}, "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            rnn.load(name)
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
