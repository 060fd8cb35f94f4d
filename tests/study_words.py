"""Words: a language model on Shakespeare in words, marks and spaces, the rare ones unknown.

    python tests/study_words.py

A tutorial names 50 to 200 as the perplexity of a word-level LSTM on a small text. Measured here:
its model (two layers of 256, embedding 64, dropout 0.3, rate 0.001), and step by step what makes it
better in the same number of steps.
"""

import contextlib
import io
import math
import tempfile

import torch
from study import save_figure, show_table

import rnn
import train_shakespeare

TUTORIAL = dict(embed=64, hidden=256, layers=2, dropout=0.3)
TIED = dict(embed=256, hidden=256, tie=True)
TRIES = {"tutorial": (TUTORIAL, dict(lr=1e-3)),
         "1 layer, tied, variational 0.5, wd": (dict(**TIED, dropout=0.5, variational=True), dict(lr=4e-3, weight_decay=0.1)),
         "1 layer, tied 0.3": (dict(**TIED, dropout=0.3), dict(lr=4e-3)),
         "rate 0.004": (TUTORIAL, dict(lr=4e-3)),
}


def prepare(text, max_size):
    """Vocabulary of the first nine tenths of the text; its ids, the last tenth's."""
    split = int(0.9 * len(text))
    vocab = rnn.Vocab.of(text[:split], words=True, max_size=max_size)
    return vocab, vocab.encode(text[:split]), vocab.encode(text[split:])


def learn(vocab, train_ids, val_ids, model, training, steps):
    """The result of `train`; perplexity on the last tenth is exp of its val_loss."""
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(len(vocab), **model))
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        return rnn.train(model, vocab, train_ids, val_ids, out, steps=steps, seed=0, context=35, evals=4, **training)

def main():
    import time, sys
    text, name = train_shakespeare.shakespeare()
    train_shakespeare.build_fused(rnn, "lstm")
    vocab, train_ids, val_ids = prepare(text, 5000)
    print(len(train_ids), len(val_ids), [(i == vocab.index["<unk>"]).double().mean() for i in (train_ids, val_ids)])
    for name, (m, t) in TRIES.items():
        t0 = time.process_time()
        r = learn(vocab, train_ids, val_ids, m, t, int(sys.argv[1]))
        print(name, math.exp(r["val_loss"]), [(a, round(math.exp(b)), round(math.exp(c))) for a,b,c in r["history"]], time.process_time()-t0, flush=True)
main()
