"""What perplexity does a language model of words reach? Rare words are unknown.

    python tests/studies/study_words.py [--data my.txt]         (10 minutes)

A tutorial names 50 to 200 as the perplexity of a word-level LSTM on a small text. It prints those
of that tutorial's model (two layers of 256, embedding 64, dropout 0.3, rate 0.001), and of what is
better in the same number of steps, and lets the better one write.
"""

import math

import study
import torch
from examples.words import split, vocabulary

import rnn

STEPS = 500  # of 32 x 35 symbols: twice through Tiny Shakespeare
TRIES = {  # name: the model, the rate
    "as in the tutorial": (dict(embed=64, hidden=256, layers=2, dropout=0.3), 1e-3),
    "1 layer, tied, rate 0.004": (dict(embed=256, hidden=256, tie=True, dropout=0.3), 4e-3)}


def prepare(text, max_size):
    """Vocabulary of the first nine tenths of a text, their ids, and the ids of the rest."""
    cut = int(0.9 * len(text))
    vocab = vocabulary(text[:cut], max_size)
    return vocab, vocab.encode(split(text[:cut])), vocab.encode(split(text[cut:]))


def learn(vocab, ids, model, lr, steps, batch=32):
    """The model, and its mean loss over the last 50 steps."""
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(len(vocab), **model))
    losses = [loss for _, loss, _ in rnn.train(model, rnn.Batches(ids, batch, 35), steps, lr=lr)]
    return model, sum(losses[-50:]) / len(losses[-50:])


def frequencies_alone(vocab, train_ids, val_ids):
    """The perplexity of a model that knows nothing but how often each symbol occurs."""
    counts = torch.bincount(train_ids, minlength=len(vocab)).double() + 1
    return math.exp(-(counts / counts.sum()).log()[val_ids].mean())


def test_words_are_learnt(text):
    vocab, train_ids, val_ids = prepare(text, max_size=9)
    assert len(vocab) == 9 and vocab.index["<unk>"] in train_ids
    small = dict(embed=16, hidden=16, tie=True, dropout=0.1, variational=True)
    model, _ = learn(vocab, train_ids.repeat(4), small, 1e-2, 150, batch=4)
    assert rnn.perplexity(model, val_ids) < frequencies_alone(vocab, train_ids, val_ids) / 3


def main():
    text = study.read_text()
    study.build()
    vocab, train_ids, val_ids = prepare(text, max_size=5000)
    unknown = [(ids == vocab.index["<unk>"]).double().mean() for ids in (train_ids, val_ids)]
    print(f"Words, marks and spaces: {len(train_ids):,} to train on, {len(val_ids):,} held out; "
          f"{len(vocab):,} symbols, unknown {unknown[0]:.1%} and {unknown[1]:.1%}; {STEPS} steps")
    rows = [["frequencies alone", "", "", f"{frequencies_alone(vocab, train_ids, val_ids):.1f}"]]
    for name, (settings, lr) in TRIES.items():
        model, loss = learn(vocab, train_ids, settings, lr, STEPS)
        rows.append([name, f"{sum(p.numel() for p in model.parameters()):,}",
                     f"{math.exp(loss):.1f}", f"{rnn.perplexity(model, val_ids):.1f}"])
    study.show_table(["model", "parameters", "perplexity, last 50 steps", "held out"], rows)
    print("".join(rnn.generate(model, vocab, split("ROMEO:"), length=60, seed=1)))


if __name__ == "__main__":
    main()
