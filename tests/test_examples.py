"""The programs in examples/: cells of one's own against their papers, the classifier, the encoder
with its decoder, words, the page of what cells do; and that each of them runs as a script."""

import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small
from examples import cells, classifier, page, seq2seq, words
from examples.cells import ClearLSTM, LayerNormLSTM, OriginalGRU, PeepholeLSTM
from examples.classifier import PAD, Classifier, accuracy, buckets, pack, pad
from examples.seq2seq import BOS, EOS, SPECIALS, Seq2Seq
from examples.words import split, story, vocabulary
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn

I, H, B, T = 4, 5, 3, 6
LENGTHS = [6, 2, 4]  # of the packed sequences
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 has 16 digits; a few are lost to summation order

OWN = [pytest.param(cls, more, id=f"{cls.__name__}{'_proj' if more else ''}")
       for cls in (OriginalGRU, PeepholeLSTM, LayerNormLSTM, ClearLSTM)
       for more in ({}, {"proj_size": 3}) if cls is not OriginalGRU or not more]
CELLS = [rnn.RNN, rnn.LSTM, rnn.GRU, OriginalGRU, PeepholeLSTM, LayerNormLSTM]


def flat(value):
    """All tensors in nested tuples, packed sequences and None."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for v in value or () for t in flat(v)]


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


# ---- cells of one's own ----


@pytest.mark.slow
def test_the_cells_learn_to_count(tmp_path):
    rows = re.findall(r"^(\w+) +(\d\.\d{3})$", runs("cells", tmp_path), re.M)
    losses = {name: float(loss) for name, loss in rows}
    assert len(losses) == 6 and all(0.29 < loss < 0.6 for loss in losses.values())
    assert losses["clear_lstm"] == pytest.approx(losses["lstm"], abs=0.002)


@pytest.mark.parametrize("cls,more", OWN)
def test_splitting_a_sequence_changes_nothing(cls, more):
    layer = cls(I, H, 2, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    whole, end = layer(x)
    first, state = layer(x[:2])
    second, state = layer(x[2:], state)
    same(torch.cat((first, second)), whole)
    same(state, end)


@pytest.mark.parametrize("cls,more", OWN)
def test_packed_equals_one_by_one(cls, more):
    layer = cls(I, H, 2, bidirectional=True, dtype=torch.float64, **more)
    x = torch.randn(T, B, I, dtype=torch.float64)
    packed, state = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    output, lengths = pad_packed_sequence(packed)
    for b, n in enumerate(lengths):
        alone, alone_state = layer(x[:n, b])
        same(output[:n, b], alone)
        same([s[:, b] for s in flat(state)], flat(alone_state))


@pytest.mark.parametrize("cls,more", OWN)
def test_first_and_second_derivatives(cls, more):
    """In both directions over sequences of 1 and 3 steps."""
    layer = cls(1, 3, bidirectional=True, dtype=torch.float64,
                **{name: 2 if name == "proj_size" else value for name, value in more.items()})
    x = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True)
    weights = dict(layer.named_parameters())

    def run(x, *values):
        input = pack_padded_sequence(x, [1, 3], enforce_sorted=False)
        result = torch.func.functional_call(layer, dict(zip(weights, values)), (input,))
        return tuple(flat(result))

    assert torch.autograd.gradcheck(run, (x, *weights.values()))
    assert torch.autograd.gradgradcheck(run, (x, *weights.values()))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cls,more", OWN)
def test_own_cells_have_every_option(cls, more, bias):
    """batch_first, one sequence, trace with gradients, dropout, further parameters by name."""
    options = dict(bias=bias, bidirectional=True, dropout=0.5, dtype=torch.float64, **more)
    layer = cls(I, H, 2, **options).eval()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, state, traces = layer.trace(x)
    other = cls(I, H, 2, batch_first=True, **options).eval()
    other.load_state_dict(layer.state_dict())
    same(other(x.transpose(0, 1))[0].transpose(0, 1), output)
    same(layer(x[:, 1])[0], output[:, 1])
    same(torch.cat((traces[2]["h"], traces[3]["h"]), dim=-1), output)
    for trace in traces:
        for value in trace.values():
            assert torch.autograd.grad(value.sum(), x, retain_graph=True)[0].any()
    assert not torch.equal(layer.train()(x)[0], output)
    extra = layer.extra_parameters()
    assert len(list(layer.parameters())) == 4 * ((4 if bias else 2) + bool(more) + len(extra))
    for name, shape in extra.items():
        assert getattr(layer, f"{name}_l1_reverse").shape == shape


def test_original_gru_is_the_papers():
    """Cho et al. 2014, written out once more for a single unit."""
    cell = OriginalGRU(1, 1, dtype=torch.float64)
    (wr, wz, wn), (ur, uz, un) = cell.weight_ih_l0.flatten(), cell.weight_hh_l0.flatten()
    br, bz, bn = cell.bias_ih_l0 + cell.bias_hh_l0
    h = torch.zeros((), dtype=torch.float64)
    x = torch.randn(T, dtype=torch.float64)
    for t in range(T):
        r, z = torch.sigmoid(wr * x[t] + ur * h + br), torch.sigmoid(wz * x[t] + uz * h + bz)
        h = (1 - z) * torch.tanh(wn * x[t] + un * (r * h) + bn) + z * h
    same(cell(x[:, None])[1].squeeze(), h)


def with_weights_of(layer, other):
    """The same values where both have a parameter; returns layer."""
    layer.load_state_dict(other.state_dict(), strict=False)
    return layer


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("layout", ["batched", "unbatched", "packed_unsorted"])
def test_four_products_equal_one(options, layout):
    theirs = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    clear = ClearLSTM(I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    input = {"batched": x, "unbatched": x[:, 0],
             "packed_unsorted": pack_padded_sequence(x, LENGTHS, enforce_sorted=False)}[layout]
    same(flat(with_weights_of(clear, theirs)(input)), flat(theirs(input)))


def test_a_peephole_that_sees_nothing_is_an_lstm():
    options = dict(bidirectional=True, proj_size=3, dtype=torch.float64)
    layer, plain = PeepholeLSTM(I, H, 2, **options), rnn.LSTM(I, H, 2, **options)
    with_weights_of(layer, plain)
    for name, value in layer.named_parameters():
        if "peep" in name:
            nn.init.zeros_(value)
    x = torch.randn(T, B, I, dtype=torch.float64)
    x = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    same(flat(layer(x)), flat(plain(x)))
    nn.init.ones_(layer.weight_peep_l0)
    assert not torch.allclose(layer(x)[0].data, plain(x)[0].data)


def test_peephole_and_layer_norm_are_the_papers():
    """Gers & Schmidhuber 2000 and Ba et al. 2016, written out once more."""
    x = torch.randn(T, I, dtype=torch.float64)

    def normal(a):
        return (a - a.mean()) / (a.var(correction=0) + 1e-5).sqrt()

    peephole = PeepholeLSTM(I, H, dtype=torch.float64)
    normed = LayerNormLSTM(I, H, dtype=torch.float64)
    assert torch.equal(normed.norm_ih_l0, torch.ones(4 * H))  # gains begin with 1
    for name, value in normed.named_parameters():
        if name.startswith("norm"):
            nn.init.normal_(value)
    for layer in (peephole, normed):
        h = c = torch.zeros(H, dtype=torch.float64)
        p = {name: value.detach() for name, value in layer.named_parameters()}
        bias = p["bias_ih_l0"] + p["bias_hh_l0"]
        for t in range(T):
            a, b = p["weight_ih_l0"] @ x[t], p["weight_hh_l0"] @ h
            if layer is peephole:
                i, f, g, o = (a + b + bias).split(H)
                wi, wf, wo = p["weight_peep_l0"].split(H)
                c_new = torch.sigmoid(f + wf * c) * c + torch.sigmoid(i + wi * c) * torch.tanh(g)
                h = torch.sigmoid(o + wo * c_new) * torch.tanh(c_new)
            else:
                a, b = normal(a) * p["norm_ih_l0"], normal(b) * p["norm_hh_l0"]
                i, f, g, o = (a + b + bias).split(H)
                c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                shown = normal(c_new) * p["norm_c_l0"] + p["bias_c_l0"]
                h = torch.sigmoid(o) * torch.tanh(shown)
            c = c_new
        same(flat(layer(x)[1]), [h[None], c[None]])


@pytest.mark.parametrize("options", [{}, {"one_hot": True}, {"layers": 2, "dropout": 0.5}], ids=str)
@pytest.mark.parametrize("cls", [OriginalGRU, PeepholeLSTM, LayerNormLSTM])
def test_own_cells_in_a_character_model(monkeypatch, tmp_path, vocab, ids, cls, options):
    """Step by step equals all at once; a checkpoint brings every parameter back."""
    monkeypatch.setitem(rnn.CELLS, "own", cls)
    model = small(vocab, cell="own", **options).double().eval()
    x = ids[:60].view(3, 20)
    whole, _ = model(x)
    state = model.init_state(3)
    for t in range(20):
        logits, state = model(x[:, t : t + 1], state)
        same(logits[:, 0], whole[:, t])
    rnn.save(tmp_path / "own.pt", model, vocab)
    again = rnn.load(tmp_path / "own.pt")[0].eval()
    assert torch.equal(again(x)[0], whole)


@pytest.mark.parametrize("cls", [PeepholeLSTM, LayerNormLSTM])
def test_initialize_knows_own_cells(cls):
    layer = cls(I, 8, 2, proj_size=3)
    extra = {name: value.clone() for name, value in layer.named_parameters()
             if name.startswith(("weight_peep", "norm"))}
    assert extra
    rnn.initialize(layer)
    for name, value in extra.items():
        assert torch.equal(getattr(layer, name), value)
    assert torch.equal(layer.bias_ih_l1.chunk(4)[1], torch.ones(8))


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


def test_a_beam_of_full_width_finds_the_likeliest():
    """All targets of up to 3 of 5 symbols, one after the other; greedy misses some of the best."""
    torch.manual_seed(4)
    model = Seq2Seq(5, embed=4, hidden=6).double()
    with torch.no_grad():
        model.output.weight *= 8
    ids, lengths = pad([torch.randint(3, 5, (n,)) for n in (1, 2, 3, 4, 5, 6)])
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


# ---- the page of what cells do ----


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
    rnn.save(path, model, vocab, run={"step": 30, "history": history})
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
    assert "<b>Ann" not in source and "after 30 steps, reads the last tenth of tags.txt" in source
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
    assert "fewer than two evaluations" in source and "after 0 steps" in source


def test_a_page_takes_shakespeare_unless_told_otherwise(folder, monkeypatch, text):
    import train_shakespeare

    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_shakespeare, "shakespeare", lambda: (text, "the plays"))
    page.main(["best.pt", "default.html"])
    assert "reads the last tenth of the plays." in read_page(folder / "default.html")[0]


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
