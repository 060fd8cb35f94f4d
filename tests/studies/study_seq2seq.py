"""Does an encoder-decoder with attention learn to rewrite dates, and strings backwards? (N -> M)

    python tests/studies/study_seq2seq.py         (about an hour; figures/seq2seq.png)

Dates come in several formats ("3 March 1998", "Mar 3, 98", ...) and become "1998-03-03". Strings
are 3 to 12 random letters. A tutorial says that tags, N -> N, and classes, N -> 1, are special
cases of this: has each letter of a string occurred before, and has the last one? Held out is what
never occurs in training.

It prints exact matches: every symbol right, and the end at the right place.
"""

import datetime
import random

import pytest
import study
import torch
import torch.nn.functional as F
from examples.classifier import buckets
from examples.seq2seq import EOS, PAD, SPECIALS, Seq2Seq, tensors

import rnn

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FORMATS = ["{d} {month} {y}", "{month} {d}, {y}", "{d}. {m}. {y}", "{mon} {d} '{yy:02}",
           "{d:02}/{m:02}/{yy:02}"]


def dates(number, seed):
    """(source, target) of random days from 1930 to 2029, each in one of the formats."""
    chance, pairs = random.Random(seed), {}
    first = datetime.date(1930, 1, 1).toordinal()
    while len(pairs) < number:
        day = datetime.date.fromordinal(first + chance.randrange(36525))
        month = day.strftime("%B")
        source = chance.choice(FORMATS).format(d=day.day, m=day.month, month=month, mon=month[:3],
                                               y=day.year, yy=day.year % 100)
        pairs[source] = day.isoformat()
    return list(pairs.items())


def letters(number, seed, alphabet, shortest, longest):
    """Random strings, all of them different."""
    chance = random.Random(seed)
    made = ("".join(chance.choices(alphabet, k=chance.randint(shortest, longest)))
            for _ in range(number))
    return list(dict.fromkeys(made))


def strings(number, seed, shortest=3, longest=12):
    """(string, the same backwards)."""
    return [(text, text[::-1]) for text in letters(number, seed, LETTERS, shortest, longest)]


def tags(number, seed):
    """(string, for every letter "+" if it has occurred before, else "-")."""
    return [(text, "".join("-+"[letter in text[:k]] for k, letter in enumerate(text)))
            for text in letters(number, seed, "abcde", 3, 8)]


def classes(number, seed):
    """(string, "+" if its last letter has occurred before, else "-")."""
    return [(text, signs[-1]) for text, signs in tags(number, seed)]


def learn(pairs, cell="gru", steps=500, seed=0, hidden=128):
    """A model trained on the pairs by teacher forcing, and its vocabulary."""
    vocab = rnn.Vocab([*SPECIALS, *sorted(set("".join(map("".join, pairs))))])
    source, lengths, target = tensors(vocab, pairs)
    torch.manual_seed(seed)
    model = rnn.initialize(Seq2Seq(len(vocab), embed=32, hidden=hidden, cell=rnn.CELLS[cell]))
    queue = []

    def next_loss():
        if not queue:
            queue.extend(buckets(lengths, 64))
        b = queue.pop()
        logits, _ = model(source[b, : lengths[b].max()], lengths[b], target[b, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[b, 1:].flatten(), ignore_index=PAD)

    study.fit(model, next_loss, steps, lr=3e-3)
    return model, vocab


def exact_matches(model, vocab, pairs, beam=1):
    """The fraction of pairs whose target is translated without a mistake."""
    source, lengths, _ = tensors(vocab, pairs)
    ids, _, _ = model.translate(source, lengths, beam, length=25)
    right = 0
    for (_, target), row in zip(pairs, ids.tolist()):
        end = row.index(EOS) if EOS in row else len(row)
        right += vocab.decode(row[:end]) == target
    return right / len(pairs)


def mirrored(model, vocab, pairs):
    """In reversed strings: how often attention is strongest within one letter of the one that is
    written."""
    source, lengths, target = tensors(vocab, pairs)
    with rnn.evaluating(model):
        _, weights = model(source, lengths, target[:, :-1])  # (B, M, T)
    step = torch.arange(weights.shape[1])
    near = (weights.argmax(-1) - (lengths[:, None] - 1 - step)).abs() <= 1  # (B, M)
    return near[step < lengths[:, None]].double().mean().item()


def held_out(make, pairs):
    known = dict(pairs)
    return [pair for pair in make(1000, 1) if pair[0] not in known]


@pytest.mark.slow
def test_dates():
    pairs = dates(6000, 0)
    model, vocab = learn(pairs, steps=600, hidden=64)
    assert exact_matches(model, vocab, held_out(dates, pairs)) >= 0.99


@pytest.mark.slow
def test_short_strings_backwards():
    def short(number, seed):
        return strings(number, seed, longest=6)

    pairs = short(30000, 0)
    model, vocab = learn(pairs, steps=500)
    held = held_out(short, pairs)
    assert exact_matches(model, vocab, held) >= 0.99
    assert mirrored(model, vocab, held) > 0.8  # it looks where the letter is


@pytest.mark.slow
@pytest.mark.parametrize("make", [tags, classes])
def test_special_cases(make):
    pairs = make(20000, 0)
    model, vocab = learn(pairs, "lstm", steps=500)
    assert exact_matches(model, vocab, held_out(make, pairs)) >= 0.97


def main():
    study.build()
    kept = {}
    longer = strings(1000, 1, shortest=13, longest=20)
    study.show_table(["task", "cell", "steps of 64", "held out", "exact, greedy", "exact, beam 4",
                      "attention at the letter", "13 to 20 letters"], [])
    for make, number, steps in ((dates, 6000, 700), (strings, 60000, 1500), (tags, 20000, 500),
                                (classes, 20000, 500)):
        pairs = make(number, 0)
        held = held_out(make, pairs)
        for cell, name in study.NAMES.items():
            model, vocab = kept[make, cell] = learn(pairs, cell, steps)
            greedy, beam = (exact_matches(model, vocab, held, beam) for beam in (1, 4))
            row = [make.__name__, name, steps, len(held), f"{greedy:.2%}", f"{beam:.2%}"]
            row += ["", ""] if make is not strings else [
                f"{mirrored(model, vocab, held):.1%}", f"{exact_matches(model, vocab, longer):.2%}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    study.save_figure("seq2seq", lambda axes: draw(axes, kept), ncols=2, figsize=(9, 4.5))


def draw(axes, kept):
    for ax, make, text in zip(axes, (dates, strings), ("3 March 1998", "attention")):
        model, vocab = kept[make, "gru"]
        ids, _, weights = model.translate(vocab.encode(text)[None], [len(text)])
        written = vocab.decode(ids[0, :-1])
        ax.imshow(weights[0], cmap="Blues", vmin=0, vmax=1)  # (M, T)
        ax.grid(False)
        ax.set(title=f"{text} → {written}", xlabel="read", ylabel="written",
               xticks=range(len(text)), xticklabels=text.replace(" ", "␣"),
               yticks=range(ids.shape[1]), yticklabels=[*written, "end"])


if __name__ == "__main__":
    main()
