"""Many to one: a classifier of sequences of any lengths, padded, packed and put into buckets.

    python tests/examples/classifier.py

makes reviews in which "not" reverses the word after it, trains for a few seconds, and prints the
accuracy on held-out reviews and the verdict on three of them.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of rnn.py
import rnn

PAD = 0  # the index of padding: "<pad>" is the first symbol of the vocabulary


def pad(sequences, value=PAD):
    """Sequences of ids, of any lengths -> ids (B, T) with `value` after each end, lengths (B,)."""
    sequences = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    return pad_sequence(sequences, batch_first=True, padding_value=value), lengths


def pack(x, lengths):
    """x (B, T, features), lengths (B,) in any order -> PackedSequence, which has no padding.
    Raises ValueError for lengths that do not fit: torch packs some of these without a word."""
    lengths = torch.as_tensor(lengths).cpu()
    if lengths.shape != x.shape[:1] or not ((lengths >= 1) & (lengths <= x.shape[1])).all():
        raise ValueError(f"lengths should be {len(x)} numbers from 1 to {x.shape[1]}, "
                         f"got {lengths.tolist()}")
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


def buckets(lengths, batch):
    """One epoch in batches of similar length, so that there is little padding: a list of indices
    (B,). The order of the batches is random, and so is that of equally long sequences."""
    lengths = torch.as_tensor(lengths)
    order = torch.randperm(len(lengths))
    chunks = order[lengths[order].argsort(stable=True)].split(batch)
    return [chunks[k] for k in torch.randperm(len(chunks))]


def accuracy(logits, targets):
    """The fraction of targets (...) that have the largest of the logits (..., classes)."""
    return (logits.argmax(dim=-1) == targets).double().mean().item()


class Classifier(nn.Module):
    """Embedding, layers, and an output that reads the hidden state in which each direction of the
    last layer ends. Two classes have two logits; their difference is what one logit would be.

    cell: the class of the layers. one_hot: the layers read one-hot vectors (embed is not used).
    dropout acts on the embedding, between layers and before the output."""

    def __init__(self, vocab_size, classes=2, embed=64, hidden=128, layers=1, cell=rnn.LSTM,
                 dropout=0.0, bidirectional=False, one_hot=False):
        super().__init__()
        if one_hot:
            self.embedding = nn.Embedding.from_pretrained(torch.eye(vocab_size))
        else:
            self.embedding = nn.Embedding(vocab_size, embed, padding_idx=PAD)
        self.rnn = cell(self.embedding.embedding_dim, hidden, layers, batch_first=True,
                        dropout=dropout if layers > 1 else 0.0, bidirectional=bidirectional)
        self.drop = nn.Dropout(dropout)
        self.output = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, ids, lengths=None):
        """ids (B, T), padded as by `pad`, and their lengths (B,), None for all T -> logits
        (B, classes). Padding is not read."""
        x = self.drop(self.embedding(ids))  # (B, T, I)
        _, state = self.rnn(x if lengths is None else pack(x, lengths))
        h = state[0] if isinstance(state, tuple) else state  # (layers * directions, B, H)
        h = torch.cat((h[-2], h[-1]), dim=-1) if self.rnn.bidirectional else h[-1]
        return self.output(self.drop(h))  # (B, classes)


def reviews(number, seed):
    """(review, 1 for praise or 0 for blame): one, three or five judgements, all of one mind."""
    chance = random.Random(seed)
    words = {1: ["good", "moving", "funny"], 0: ["bad", "boring", "silly"]}
    result = []
    for _ in range(number):
        label, parts = chance.randrange(2), []
        for _ in range(chance.choice((1, 3, 5))):
            negated = chance.random() < 0.5
            word = chance.choice(words[label ^ negated])
            parts.append(f"{chance.choice(('it', 'the film', 'the end'))} is "
                         f"{'not ' if negated else ''}{word}")
        result.append((" and ".join(parts), label))
    return result


def main(epochs=3):
    """Trains on 1,000 reviews, tests on 500 others."""
    made = reviews(1500, seed=0)
    vocab = rnn.Vocab(["<pad>", *sorted({word for review, _ in made for word in review.split()})])
    ids, lengths = pad([vocab.encode(review.split()) for review, _ in made])  # (1500, T), (1500,)
    labels = torch.tensor([label for _, label in made])
    torch.manual_seed(0)
    model = rnn.initialize(Classifier(len(vocab), embed=16, hidden=32))
    optimizer = rnn.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for epoch in range(epochs):
        for rows in buckets(lengths[:1000], 32):
            loss = F.cross_entropy(model(ids[rows], lengths[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with rnn.evaluating(model):
            logits = model(ids[1000:], lengths[1000:])  # (500, 2)
        print(f"epoch {epoch + 1}: {accuracy(logits, labels[1000:]):.1%} of held-out reviews right")
    for (review, _), praise in zip(made[1000:1003], logits.softmax(-1)[:, 1]):
        print(f"{praise:7.2%} praise: {review}")


if __name__ == "__main__":
    main()
