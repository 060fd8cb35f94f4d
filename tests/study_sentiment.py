"""Sentiment, N -> 1: six short Chinese sentences, and long reviews in which order matters.

    python tests/study_sentiment.py

The six sentences are those of a tutorial that says that an RNN learns them, and that an LSTM does
better on longer, contradictory ones. The long reviews are made here: filler, with three opinions
somewhere, "good" or "bad", some of them after a "not". The majority is the label. A "not" stands as
often before words without sentiment, so that counting words does not help.
"""

import itertools
import random

import torch
import torch.nn.functional as F
from study import COLOURS, NAMES, fit, save_figure, show_table

import rnn

SENTENCES = [("电影 好看", 1), ("饭菜 难吃", 0), ("天气 糟糕", 0), ("音乐 好听", 1),
             ("电影 难看", 0), ("饭菜 好吃", 1)]
# What comes after 但 (but) decides. It and some of the other words never occur in the six.
HARDER = [("剧情 一般 但 演技 好", 1), ("饭菜 好吃 但 分量 少", 0),
          ("天气 糟糕 但 心情 好", 1), ("电影 好看 但 心情 糟糕", 0),
          ("饭菜 难吃 但 音乐 好听", 1), ("音乐 好听 但 电影 难看", 0)]
STACKS = ((1, False), (2, False), (3, False), (1, True))  # layers, bidirectional


def six_sentences(cell, seed, steps=60):
    """A classifier of width 4 on one-hot words; its accuracy on the six and on the harder ones."""
    torch.manual_seed(seed)
    text = "".join(" " + sentence for sentence, _ in SENTENCES + HARDER)
    vocab = rnn.Vocab.of(text, words=True, specials=["<pad>"])
    (x, lengths), y = encode(vocab, SENTENCES)
    model = rnn.initialize(rnn.Classifier(len(vocab), hidden=4, cell=cell, one_hot=True))
    fit(model, lambda: F.cross_entropy(model(x, lengths), y), steps, lr=0.05)
    with rnn.evaluating(model):
        (x2, lengths2), y2 = encode(vocab, HARDER)
        right = (model(x2, lengths2).argmax(-1) == y2).double()  # (6,)
        return rnn.accuracy(model(x, lengths), y), right


def encode(vocab, labelled):
    """(sentence, label) pairs -> (ids (B, T), lengths (B,)), labels (B,)."""
    return (rnn.pad([vocab.encode(" " + sentence) for sentence, _ in labelled]),
            torch.tensor([label for _, label in labelled]))


WORDS = ["<pad>", "good", "bad", "not", "long", "loud", "dark"] + [f"word{k}" for k in range(20)]
GOOD, BAD, NOT = 1, 2, 3


def review(chance, longest):
    """One review: ids, and whether it is a good one."""
    length = chance.randint(20, longest)
    parts = [[chance.randrange(7, len(WORDS))] for _ in range(length)]
    score = 0
    for k in chance.sample(range(length), 3):
        mood, negated = chance.choice((GOOD, BAD)), chance.random() < 0.5
        parts[k] = [NOT, mood] if negated else [mood]
        score += 1 if (mood == GOOD) != negated else -1
    for k in chance.sample(range(length), 3):
        if len(parts[k]) == 1 and parts[k][0] > BAD:
            parts[k] = [NOT] * chance.randint(0, 1) + [chance.randint(4, 6)]  # not long, loud, dark
    return list(itertools.chain(*parts)), int(score > 0)


def reviews(number, longest, seed):
    """ids (B, T) and lengths (B,) of all, labels (B,)."""
    chance = random.Random(seed)
    made = [review(chance, longest) for _ in range(number)]
    return *rnn.pad([ids for ids, _ in made]), torch.tensor([label for _, label in made])


def bag_of_words(train, test, steps=300):
    """What counting words can do: logistic regression on the counts of all words."""
    def counts(ids):
        return F.one_hot(ids, len(WORDS)).sum(1).float()[:, 1:]  # without <pad>
    model = torch.nn.Linear(len(WORDS) - 1, 2)
    fit(model, lambda: F.cross_entropy(model(counts(train[0])), train[2]), steps, lr=0.05)
    return rnn.accuracy(model(counts(test[0])), test[2])


def batches(data, epochs, bucketed=True):
    """Batches of 32, each cut to its longest review."""
    ids, lengths, labels = data
    for _ in range(epochs):
        rows = rnn.buckets(lengths, 32) if bucketed else torch.randperm(len(ids)).split(32)
        for b in rows:
            yield ids[b, : lengths[b].max()], lengths[b], labels[b]


def long_reviews(train, test, cell, layers=1, bidirectional=False, seed=0, epochs=6):
    """Accuracy on held-out reviews, and the training losses."""
    torch.manual_seed(seed)
    model = rnn.initialize(rnn.Classifier(len(WORDS), embed=16, hidden=48, layers=layers,
                                          cell=cell, bidirectional=bidirectional))
    source = batches(train, epochs)

    def next_loss():
        ids, lengths, labels = next(source)
        return F.cross_entropy(model(ids, lengths), labels)

    losses = fit(model, next_loss, epochs * -(-len(train[0]) // 32), lr=5e-3)
    with rnn.evaluating(model):
        return rnn.accuracy(model(test[0], test[1]), test[2]), losses


def padding(data, bucketed):
    """What part of the symbols in an epoch's batches is padding."""
    sizes = [(ids.numel(), int(lengths.sum())) for ids, lengths, _ in batches(data, 1, bucketed)]
    return 1 - sum(valid for _, valid in sizes) / sum(all_ for all_, _ in sizes)


def test_six_sentences_are_learnt():
    for cell in NAMES:
        assert [six_sentences(cell, seed)[0] for seed in range(3)] == [1.0] * 3


def test_order_matters_and_gates_find_it():
    train, test = reviews(3000, 60, 0), reviews(1000, 60, 1)
    assert bag_of_words(train, test) < 0.6
    assert long_reviews(train, test, "lstm")[0] > 0.95
    assert long_reviews(train, test, "gru")[0] > 0.95
    assert long_reviews(train, test, "rnn")[0] < 0.75  # it forgets the first opinions


def test_buckets_hold_little_padding():
    data = reviews(1000, 100, 0)
    assert padding(data, bucketed=True) < 0.05 < 0.3 < padding(data, bucketed=False)


def main():
    print("Six sentences: one-hot, width 4, 60 steps, 20 seeds\n")
    rows = []
    for cell in NAMES:
        results = [six_sentences(cell, seed) for seed in range(20)]
        learnt = sum(accuracy == 1 for accuracy, _ in results)
        harder = torch.stack([right for _, right in results]).mean(0)  # (6,)
        rows.append([NAMES[cell], f"{learnt} of 20 seeds", f"{harder.mean():.0%}",
                     *(f"{part:.0%}" for part in harder)])
    show_table(["cell", "all six right", "harder ones", *(text for text, _ in HARDER)], rows)

    train, test = reviews(3000, 100, 0), reviews(1000, 100, 1)
    print(f"\nLong reviews: 3000 of {int(train[1].min())} to {int(train[1].max())} words to train "
          f"on, 1000 held out; counting words is right in {bag_of_words(train, test):.1%}")
    print(f"Padding in an epoch: {padding(train, False):.1%} in random batches, "
          f"{padding(train, True):.1%} in buckets, none of it read in packed ones\n")
    runs = {(cell, stack): [long_reviews(train, test, cell, *stack, seed) for seed in range(2)]
            for cell in NAMES for stack in STACKS}
    show_table(["cell", "1 layer", "2 layers", "3 layers", "1, both directions"],
               [[NAMES[cell], *("; ".join(f"{accuracy:.1%}" for accuracy, _ in runs[cell, stack])
                                for stack in STACKS)] for cell in NAMES])
    save_figure("sentiment", lambda axes: draw(axes, runs), ncols=2, figsize=(10, 3.6))


def draw(axes, runs):
    """runs[cell, stack]: (accuracy, training losses) of every seed."""
    for cell, name in NAMES.items():
        losses = torch.tensor(runs[cell, STACKS[0]][0][1]).unfold(0, 20, 1).mean(1)
        axes[0].plot(losses, color=COLOURS[cell], label=name)
        values = [[100 * accuracy for accuracy, _ in runs[cell, stack]] for stack in STACKS]
        axes[1].plot(values, "o", color=COLOURS[cell])
        axes[1].plot([sum(pair) / 2 for pair in values[:3]], color=COLOURS[cell])
    axes[0].set(title="Training loss of 1 layer, mean of 20 steps", xlabel="training step",
                ylabel="nats per review", ylim=(0, None))
    axes[0].legend()
    axes[1].set(title="Held-out reviews that are right, one dot a seed", ylabel="%",
                ylim=(45, 102), xticks=range(4),
                xticklabels=["1 layer", "2 layers", "3 layers", "1, both\ndirections"])


if __name__ == "__main__":
    main()
