"""Words as symbols: a text split into words, marks and spaces, from which it can be put together.

    python tests/examples/words.py

shows how a text is split, trains a model of words for a few seconds on sentences made here, and
prints its perplexity per symbol and what it writes.
"""

import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of rnn.py
import rnn


def split(text):
    """str -> list of str, whose join is the text: words, runs of marks, and white space. A single
    space belongs to the word or marks after it, so most spaces cost no symbol of their own.

        split("Don't stop, Ann.\\n") == ["Don't", " stop", ",", " Ann", ".", "\\n"]

    rnn.Vocab.of takes such a list as a text, and then decode(encode(split(text))) == text."""
    return re.findall(r" ?\w+(?:'\w+)*| ?[^\w\s]+|\s+", text)


def vocabulary(text, max_size):
    """The max_size - 1 most frequent symbols of a text, the most frequent first, after "<unk>",
    which stands for all others."""
    frequent = Counter(split(text)).most_common(max_size - 1)
    return rnn.Vocab(["<unk>", *(symbol for symbol, _ in frequent)])


def story(sentences, seed=0):
    """A text that is easy to predict in part: who it is about decides how the sentence ends."""
    chance = random.Random(seed)
    ends = {"Ann": ["reads a book", "doesn't sleep"], "The dog": ["barks", "chases the cat"],
            "Rain": ["falls on the roof"]}
    text = ""
    for _ in range(sentences):
        who = chance.choice(list(ends))
        text += f"{who} {chance.choice(ends[who])}{chance.choice(('.', '!'))}\n"
    return text


def main(steps=100):
    print(split("Don't stop, Ann.\n"))
    text = story(2000)
    vocab = vocabulary(text, max_size=18)
    ids = vocab.encode(split(text))
    print(f"{len(text):,} characters are {len(ids):,} symbols, such as {vocab.symbols[1:6]}; "
          f"{(ids == 0).double().mean():.1%} of them are unknown to a vocabulary of {len(vocab)}")
    cut = int(0.9 * len(ids))
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(len(vocab), embed=16, hidden=32))
    for _ in rnn.train(model, rnn.Batches(ids[:cut], batch=16, context=20), steps, lr=0.01):
        pass
    print(f"perplexity of held-out symbols: {rnn.perplexity(model, ids[cut:]):.2f}")
    print("Ann" + "".join(rnn.generate(model, vocab, split("Ann"), length=40, seed=0)))


if __name__ == "__main__":
    main()
