"""The programs in examples/: each runs as a script; the classifier, the encoder with its decoder,
and words. The cells are tested in test_cells.py, the page in test_page.py."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from examples import cells, classifier, seq2seq, words
from examples.cells import LayerNormLSTM, OriginalGRU, PeepholeLSTM
from examples.classifier import PAD, Classifier, accuracy, buckets, pack, pad
from examples.seq2seq import BOS, EOS, SPECIALS, Seq2Seq
from examples.words import split, story, vocabulary
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

import rnn

TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order

CELLS = [rnn.RNN, rnn.LSTM, rnn.GRU, OriginalGRU, PeepholeLSTM, LayerNormLSTM]


def same(a, b):
    torch.testing.assert_close(a, b, **TIGHT)


def runs(name, folder):
    """What an example prints when it is run as a script, from any folder."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "examples" / f"{name}.py")],
                          cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("main,shows", [
    (lambda: cells.main(steps=2), r"layer_norm +\d\.\d{3}\n\Z"),
    (lambda: classifier.main(epochs=1), r"epoch 1: \d+\.\d% .*\n( *\d+\.\d\d% praise: .*\n){3}\Z"),
    (lambda: seq2seq.main(steps=2), r"0\.\d{3}\nwhere it looks.*\n   .*\n( . [ .:*#]+\n){1,10}\Z"),
    (lambda: words.main(steps=2), r"perplexity of held-out symbols: \d+\.\d\d\nAnn"),
], ids=["cells", "classifier", "seq2seq", "words"])
def test_each_example_runs(monkeypatch, capsys, main, shows):
    monkeypatch.setattr(rnn, "CELLS", dict(rnn.CELLS))  # cells.main adds to it
    main()
    assert re.search(shows, capsys.readouterr().out)


@pytest.mark.slow
def test_the_cells_learn_to_count(tmp_path):
    rows = re.findall(r"^(\w+) +(\d\.\d{3})$", runs("cells", tmp_path), re.M)
    losses = {name: float(loss) for name, loss in rows}
    assert len(losses) == 6 and all(0.29 < loss < 0.6 for loss in losses.values())
    assert losses["clear_lstm"] == pytest.approx(losses["lstm"], abs=0.002)


# ---- classifier ----

SIZES = [5, 1, 7, 3]


def sentences(vocab_size=11):
    """Four random sequences: padded, with an 8th column that is only padding, and as a list."""
    torch.manual_seed(1)
    each = [torch.randint(3, vocab_size, (n,)) for n in SIZES]
    ids, lengths = pad(each)
    return nn.functional.pad(ids, (0, 1)), lengths, each


@pytest.mark.slow
def test_the_classifier_learns_what_not_means(tmp_path):
    printed = runs("classifier", tmp_path)
    assert float(re.findall(r"(\S+)% of held-out reviews right", printed)[-1]) > 95
    assert len(re.findall(r"^ *\d+\.\d\d% praise: .* is ", printed, re.M)) == 3


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"layers": 2, "bidirectional": True},
                                     {"one_hot": True, "classes": 5}], ids=str)
def test_classifier_reads_no_padding(cell, options):
    """Padded and packed, every sequence has the logits that it has alone, and no others matter."""
    model = Classifier(11, embed=4, hidden=6, cell=cell, **options).double()
    ids, lengths, each = sentences()
    logits = model(ids, lengths)
    assert logits.shape == (4, options.get("classes", 2))
    same(logits, torch.cat([model(x[None]) for x in each]))
    other = torch.where(torch.arange(8) < lengths[:, None], ids, 7)  # other padding
    same(model(other, lengths), logits)


def test_classifier_equals_torch_modules():
    model = Classifier(11, embed=4, hidden=6, layers=2, bidirectional=True).double()
    theirs = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(model.rnn.state_dict())
    ids, lengths, each = sentences()
    for x, logits in zip(each, model(ids, lengths)):
        output = theirs(model.embedding(x[None]))[0][0]  # (T, 12)
        last = torch.cat((output[-1, :6], output[0, 6:]))  # each direction's own last step
        same(logits, model.output(last))


def test_one_hot_reads_a_column_of_the_weights():
    model = Classifier(11, hidden=6, cell=rnn.RNN, one_hot=True).double()
    p = model.rnn
    h = torch.tanh(p.weight_ih_l0[:, 7] + p.bias_ih_l0 + p.bias_hh_l0)
    same(model(torch.tensor([[7]]))[0], model.output(h))
    assert not model.embedding.weight.requires_grad


def test_two_logits_are_one():
    """The difference of the two, under torch's loss for a single logit."""
    model = Classifier(11, embed=4, hidden=6).double()
    ids, lengths, _ = sentences()
    logits, targets = model(ids, lengths), torch.tensor([0, 1, 1, 0])
    one = nn.functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0],
                                                         targets.double())
    same(nn.functional.cross_entropy(logits, targets), one)


def test_padding_has_no_vector_and_learns_none():
    model = Classifier(11, embed=4, hidden=6)
    assert not model.embedding.weight[PAD].any()
    model(sentences()[0]).sum().backward()  # unpacked: the padding is read, as zeros
    assert not model.embedding.weight.grad[PAD].any() and model.embedding.weight.grad.any()


def test_classifier_dropout():
    model = Classifier(11, embed=4, hidden=6, layers=2, dropout=0.5)
    ids, lengths, _ = sentences()
    assert not torch.equal(model(ids, lengths), model(ids, lengths))
    assert torch.equal(model.eval()(ids, lengths), model(ids, lengths))


@pytest.mark.parametrize("lengths", [[0, 1, 7, 3], [9, 1, 7, 3], [5, 1, 7], [5, 1, 7, 3, 2]],
                         ids=str)
def test_wrong_lengths(lengths):
    ids = sentences()[0]
    message = r"4 numbers from 1 to 8, got \[" + str(lengths[0])
    with pytest.raises(ValueError, match=message):
        Classifier(11)(ids, torch.tensor(lengths))
    with pytest.raises(ValueError, match=message):
        Seq2Seq(11)(ids, torch.tensor(lengths), ids)


def test_nothing_to_classify_is_one_clear_error():
    """torch's own."""
    none = torch.empty(0, 8, dtype=torch.long)
    for model in (lambda: Classifier(11)(none, none[:, 0]),
                  lambda: Seq2Seq(11)(none, none[:, 0], none)):
        with pytest.raises(RuntimeError, match="Cannot pack empty tensors"):
            model()
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        Classifier(11)(torch.empty(4, 0, dtype=torch.long))
    with pytest.raises(RuntimeError, match="empty list of sequences"):
        pad([])
    for batch in (0, -1):
        with pytest.raises(RuntimeError, match="split.size"):
            buckets([3, 1, 2], batch)


@pytest.mark.parametrize("model", [Classifier, Seq2Seq])
def test_a_state_dict_brings_a_model_back(model, tmp_path):
    def make():
        return model(11, embed=4, hidden=6, layers=2, cell=rnn.GRU, dropout=0.1)

    one, other = make(), make()
    torch.save(one.state_dict(), tmp_path / "a.pt")
    other.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_pad_and_back():
    ids, lengths, each = sentences()
    assert lengths.tolist() == SIZES and pad([[1, 2], [3]])[0].tolist() == [[1, 2], [3, 0]]
    packed = pack(ids[..., None], lengths)
    again, sizes = pad_packed_sequence(packed, batch_first=True)
    assert torch.equal(again[..., 0], ids[:, :7]) and torch.equal(sizes, lengths)
    assert torch.equal(pad(each, value=9)[0] == 9, ids[:, :7] == 0)
    empty = pad([[1, 2], []])
    assert empty[0].tolist() == [[1, 2], [0, 0]] and empty[1].tolist() == [2, 0]


def test_buckets_are_an_epoch_of_similar_lengths():
    lengths = torch.randint(1, 100, (1000,))
    epoch = buckets(lengths, 32)
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(1000))
    assert sorted(len(rows) for rows in epoch) == [8] + [32] * 31
    padded = sum(int(lengths[rows].max()) * len(rows) for rows in epoch)
    assert padded < 1.05 * lengths.sum() < 1.5 * padded  # 32 in a row at random: about 1.9 times
    tops = [int(lengths[rows].max()) for rows in epoch]
    assert tops != sorted(tops)
    assert not torch.equal(epoch[0], buckets(lengths, 32)[0])


def test_accuracy():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3, rel=1e-12)
    assert accuracy(logits[None], torch.tensor([[1, 0, 1]])) == 1.0


# ---- encoder and decoder ----


def translator(cell=rnn.LSTM, **options):
    torch.manual_seed(0)
    model = Seq2Seq(11, **{"embed": 4, "hidden": 6, "cell": cell, **options}).double()
    with torch.no_grad():
        model.output.weight *= 5  # predictions that are not all alike
    return model


@pytest.mark.slow
def test_seq2seq_learns_dates_and_shows_where_it_looks(tmp_path):
    printed = runs("seq2seq", tmp_path)
    assert float(re.search(r"(\S+)% of 200 held-out dates", printed)[1]) > 80
    assert len(re.findall(r"^\d+ [a-z]+ \d{4} -> \S+ +probability 0\.\d{3}$", printed, re.M)) == 3
    assert len(re.findall(r"^ [\d-] [ .:*#]+$", printed, re.M)) == 10


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_never_leaks_into_a_translation(cell, layers):
    model = translator(cell, layers=layers)
    ids, lengths, each = sentences()
    target = torch.tensor([[BOS, 4, 5, 6]] * 4)
    logits, weights = model(ids, lengths, target)
    assert logits.shape == (4, 4, 11) and weights.shape == (4, 4, 8)
    same(weights.sum(-1), torch.ones(4, 4, dtype=torch.float64))
    for b, x in enumerate(each):
        alone, looks = model(x[None], [len(x)], target[:1])
        same(logits[b], alone[0])
        same(weights[b, :, : len(x)], looks[0])
        assert not weights[b, :, len(x) :].any()
    for beam in (1, 3):
        ids_out, logp, _ = model.translate(ids, lengths, beam, 6)
        for b, x in enumerate(each):
            alone, one, _ = model.translate(x[None], [len(x)], beam, 6)
            n = alone.shape[1]
            assert torch.equal(ids_out[b, :n], alone[0]) and (ids_out[b, n:] == EOS).all()
            same(logp[b], one[0])


def test_gradients_never_reach_padding():
    """Nor do those of the encoder's symbols after a source's end."""
    model = translator()
    ids, lengths, _ = sentences()
    seen = []
    model.drop.register_forward_hook(lambda module, args, x: (x.retain_grad(), seen.append(x))[0])
    model(ids, lengths, torch.tensor([[BOS, 4, 5, 6]] * 4))[0].sum().backward()
    reached = seen[0].grad.abs().sum(-1) > 0  # (B, T), of the source's vectors
    assert torch.equal(reached, torch.arange(8) < lengths[:, None])
    assert not model.embedding.weight.grad[PAD].any()


def test_attention_and_start_equal_torch_modules():
    """The encoder's states and the decoder's from nn.LSTM, the attention written out."""
    model = translator(layers=2)
    encoder = nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    decoder = nn.LSTM(4, 6, 2, batch_first=True, dtype=torch.float64)
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    x, y = torch.tensor([[5, 3, 8]]), torch.tensor([[BOS, 4]])
    memory, state = encoder(model.embedding(x))
    start = tuple(torch.stack([torch.cat((s[2 * k], s[2 * k + 1]), -1) for k in (0, 1)])
                  for s in state)
    q = decoder(model.embedding(y), start)[0]
    logits, weights = model(x, [3], y)
    for m in range(2):
        scores = torch.stack([model.query.weight @ q[0, m] @ memory[0, t] for t in range(3)])
        expected = torch.softmax(scores, 0)
        same(weights[0, m], expected)
        context = sum(expected[t] * memory[0, t] for t in range(3))
        h = torch.tanh(model.mix(torch.cat((q[0, m], context))))
        same(logits[0, m], model.output(h))


@pytest.mark.parametrize("cell", [rnn.LSTM, rnn.GRU])
def test_a_beam_of_one_is_greedy(cell):
    """One symbol at a time through `forward`, which reads the whole target again every time."""
    model = translator(cell)
    ids, lengths, _ = sentences()
    result, logp, weights = model.translate(ids, lengths, beam=1, length=6)
    for b in range(4):
        target, expected = [BOS], 0.0
        while len(target) <= 6 and target[-1] != EOS:
            logits, looks = model(ids[b : b + 1], lengths[b : b + 1], torch.tensor([target]))
            scores = logits[0, -1].log_softmax(-1)
            expected += scores.max().item()
            target.append(scores.argmax().item())
        n = len(target) - 1
        assert result[b, :n].tolist() == target[1:] and (result[b, n:] == EOS).all()
        assert logp[b].item() == pytest.approx(expected, rel=1e-12)
        same(weights[b, :n], looks[0])


def wavering(seed):
    """A translator of 5 symbols whose targets differ, and whose likeliest are not the greedy ones;
    six sources, padded, and their lengths."""
    torch.manual_seed(seed)
    model = Seq2Seq(5, embed=4, hidden=6).double()
    with torch.no_grad():
        model.embedding.weight *= 3
        model.output.weight *= 8
    return model, *pad([torch.randint(3, 5, (n,)) for n in (1, 2, 3, 4, 5, 6)])


def test_a_beam_of_full_width_finds_the_likeliest():
    """All targets of up to 3 of 5 symbols, one after the other; greedy misses some of the best."""
    model, ids, lengths = wavering(seed=3)
    result, logp, _ = model.translate(ids, lengths, beam=5**3, length=3)
    greedy = model.translate(ids, lengths, beam=1, length=3)[1]
    assert (greedy < logp - 1e-6).any() and (greedy <= logp + 1e-12).all()
    for b in range(len(ids)):
        best = (-math.inf, None)
        for target in itertools.product(range(5), repeat=3):
            if EOS in target:
                target = target[: target.index(EOS) + 1]
            read = torch.tensor([[BOS, *target[:-1]]])
            logits = model(ids[b : b + 1], lengths[b : b + 1], read)[0][0].log_softmax(-1)
            best = max(best, (sum(row[s].item() for row, s in zip(logits, target)), target))
        assert logp[b].item() == pytest.approx(best[0], rel=1e-12)
        assert tuple(result[b].tolist())[: len(best[1])] == best[1]


@pytest.mark.parametrize("seed", [1, 3, 4])
@pytest.mark.parametrize("beam", [2, 3])
def test_beam_search_written_out(beam, seed):
    """For one source after the other, with lists."""
    model, ids, lengths = wavering(seed)
    result, logp, _ = model.translate(ids, lengths, beam, length=6)
    assert len({tuple(row) for row in result.tolist()}) > 2
    for b in range(len(ids)):
        kept = [([BOS], 0.0)]  # the likeliest targets, and ln of their probabilities
        for _ in range(result.shape[1]):
            longer = [(target + [EOS], total) for target, total in kept if target[-1] == EOS]
            for target, total in kept:
                if target[-1] != EOS:
                    logits, _ = model(ids[b : b + 1], lengths[b : b + 1], torch.tensor([target]))
                    scores = logits[0, -1].log_softmax(-1).tolist()
                    longer += [(target + [s], total + scores[s]) for s in range(5)]
            kept = sorted(longer, key=lambda row: -row[1])[:beam]
        assert result[b].tolist() == kept[0][0][1:]
        assert logp[b].item() == pytest.approx(kept[0][1], rel=1e-12)


def test_translation_ends_early_and_leaves_the_model_as_it_was():
    model = translator()
    with torch.no_grad():
        model.output.bias[EOS] = 100
    ids, lengths, _ = sentences()
    result, logp, weights = model.translate(ids, lengths, beam=2)
    assert result.tolist() == [[EOS]] * 4 and weights.shape == (4, 1, 8)
    assert model.training and not logp.requires_grad
    for beam, length in ((0, 5), (1, 0)):
        with pytest.raises(ValueError, match=f"got {beam} and {length}"):
            model.translate(ids, lengths, beam, length)
    with pytest.raises(ValueError, match="hidden must be even, half for each direction, got 7"):
        Seq2Seq(11, hidden=7)


def test_specials_stand_where_their_names_say():
    vocab = rnn.Vocab(SPECIALS + sorted(set("abc")))
    assert [vocab.index[symbol] for symbol in ("<pad>", "<bos>", "<eos>")] == [PAD, BOS, EOS]


# ---- words ----


@pytest.mark.parametrize("text", [
    "plain", "tabs\tand\r\nline ends\n\n", "naïve — “quoted” ✓", "日本語テキスト",
    "\U0001f469\u200d\U0001f467 é e\u0301",
    "\x00\x7f\ufeff", "a  b   c\n  d", " leading", "don't; can't -- stop!?", "\ud800 lone",
])
def test_words_round_trip(text):
    symbols = split(text)
    vocab = rnn.Vocab.of(symbols)
    assert vocab.decode(vocab.encode(symbols)) == text


def test_words_keep_their_space_and_their_apostrophe():
    assert split("Don't stop, Ann.\n") == ["Don't", " stop", ",", " Ann", ".", "\n"]
    assert split("to  be -- or") == ["to", "  ", "be", " --", " or"]


def test_a_vocabulary_of_the_most_frequent_words():
    vocab = vocabulary("to be or not to be, to be", max_size=3)
    assert vocab.symbols == ["<unk>", " be", " to"]
    assert vocab.decode(vocab.encode(split("x to be"))) == "<unk> to be"
    text = story(5)
    assert vocabulary(text, 1000).symbols[1:] == sorted(
        set(split(text)), key=lambda s: (-split(text).count(s), split(text).index(s)))


def test_a_model_of_words_learns(tmp_path):
    printed = runs("words", tmp_path)
    perplexity = float(re.search(r"perplexity of held-out symbols: (\S+)", printed)[1])
    assert 1.3 < perplexity < 3  # of 18 symbols
    assert re.search(r"^(Rain falls on the roof|The dog|Ann reads|Ann doesn't)", printed, re.M)
