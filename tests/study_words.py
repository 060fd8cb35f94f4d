"""Words: a language model on Shakespeare in words, marks and spaces, the rare ones unknown.

    python tests/study_words.py                 Tiny Shakespeare, as train_shakespeare.py finds it
    python tests/study_words.py --data my.txt

A tutorial names 50 to 200 as the perplexity of a word-level LSTM on a small text. Measured here:
its model (two layers of 256, embedding 64, dropout 0.3, rate 0.001), and what makes it better in
the same number of steps.
"""

import contextlib
import io
import math
import sys
import tempfile

import torch
from study import show_table, text_and_fused_lstm

import rnn
from train_shakespeare import train

STEPS = 500  # of 32 x 35 symbols: twice through the text
# name: the model, its training
TRIES = {"as in the tutorial": (dict(embed=64, hidden=256, layers=2, dropout=0.3), dict(lr=1e-3)),
         "1 layer, tied, rate 0.004": (dict(embed=256, hidden=256, tie=True, dropout=0.3),
                                       dict(lr=4e-3))}


def prepare(text, max_size):
    """Vocabulary of the first nine tenths of a text, the ids of these, the ids of the rest."""
    split = int(0.9 * len(text))
    vocab = rnn.Vocab.of(text[:split], words=True, max_size=max_size)
    return vocab, vocab.encode(text[:split]), vocab.encode(text[split:])


def learn(vocab, train_ids, val_ids, model, training, steps):
    """The model and the result of `train`."""
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(len(vocab), **model))
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        return model, train(model, vocab, train_ids, val_ids, out, steps=steps, context=35,
                            evals=1, **training)


def frequencies_alone(vocab, train_ids, val_ids):
    """The perplexity of a model that knows nothing but how often each symbol occurs."""
    counts = torch.bincount(train_ids, minlength=len(vocab)).double() + 1
    return math.exp(-(counts / counts.sum()).log()[val_ids].mean())


def test_words_are_learnt(text):
    vocab, train_ids, val_ids = prepare(text, max_size=9)
    assert len(vocab) == 9 and vocab.index["<unk>"] in train_ids
    alone = frequencies_alone(vocab, train_ids, val_ids)
    small = dict(embed=16, hidden=16, tie=True, dropout=0.1, variational=True)
    _, result = learn(vocab, train_ids.repeat(4), val_ids, small, dict(batch=4, lr=1e-2), 150)
    assert math.exp(result["val_loss"]) < alone / 3


def main():
    text = text_and_fused_lstm()
    vocab, train_ids, val_ids = prepare(text, max_size=5000)
    unknown = [(ids == vocab.index["<unk>"]).double().mean() for ids in (train_ids, val_ids)]
    print(f"Words, marks and spaces: {len(train_ids):,} to train on, {len(val_ids):,} held out; "
          f"{len(vocab):,} symbols, unknown {unknown[0]:.1%} and {unknown[1]:.1%}; {STEPS} steps")
    rows = [["frequencies alone", "", "", f"{frequencies_alone(vocab, train_ids, val_ids):.1f}"]]
    best = math.inf
    for name, (settings, training) in TRIES.items():
        model, result = learn(vocab, train_ids, val_ids, settings, training, STEPS)
        rows.append([name, f"{sum(p.numel() for p in model.parameters()):,}",
                     f"{math.exp(result['history'][-1][1]):.1f}",
                     f"{math.exp(result['val_loss']):.1f}"])
        print(f"{name}: {rows[-1][-1]}", file=sys.stderr, flush=True)
        if result["val_loss"] < best:
            best, writer = result["val_loss"], model
    show_table(["model", "parameters", "perplexity in training", "held out"], rows)
    print(rnn.generate(writer, vocab, "ROMEO:", length=60, seed=1))


if __name__ == "__main__":
    main()
