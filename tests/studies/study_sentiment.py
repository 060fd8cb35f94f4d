"""When can a network tell praise from blame? (N -> 1) Short sentences, long reviews in which order
matters, and word vectors learnt beforehand.

    python tests/studies/study_sentiment.py         (half an hour; figures/sentiment.png)

The six sentences are those of a tutorial that says that an RNN learns them, and that an LSTM does
better on longer, contradictory ones. The long reviews are made here: filler, with three opinions
somewhere, "good" or "bad", some of them after a "not". The majority is the label. A "not" stands as
often before words without sentiment, so that counting words does not help.

It prints the accuracy on held-out reviews by cell, layers, directions, stop words, optimizer, and
by the word vectors that training starts from.
"""

import itertools
import random

import pytest
import study
import torch
import torch.nn.functional as F
from examples.classifier import PAD, Classifier, accuracy, buckets, pad
from study import NAMES, fit

import rnn

# ----------------------------------------------------------------------------------------------
# Six sentences

SENTENCES = [("电影 好看", 1), ("饭菜 难吃", 0), ("天气 糟糕", 0), ("音乐 好听", 1),
             ("电影 难看", 0), ("饭菜 好吃", 1)]
# What comes after 但 (but) decides. It and some of the other words never occur in the six.
HARDER = [("剧情 一般 但 演技 好", 1), ("饭菜 好吃 但 分量 少", 0),
          ("天气 糟糕 但 心情 好", 1), ("电影 好看 但 心情 糟糕", 0),
          ("饭菜 难吃 但 音乐 好听", 1), ("音乐 好听 但 电影 难看", 0)]


def six_sentences(cell, seed, steps=60):
    """A classifier of width 4 on one-hot words; its accuracy on the six and on the harder ones."""
    torch.manual_seed(seed)
    words = " ".join(sentence for sentence, _ in SENTENCES + HARDER).split()
    vocab = rnn.Vocab(["<pad>", *sorted(set(words))])
    six, harder = ((*pad([vocab.encode(sentence.split()) for sentence, _ in labelled]),
                    torch.tensor([label for _, label in labelled]))
                   for labelled in (SENTENCES, HARDER))  # ids (B, T), lengths (B,), labels (B,)
    model = rnn.initialize(Classifier(len(vocab), hidden=4, cell=rnn.CELLS[cell], one_hot=True))
    fit(model, lambda: F.cross_entropy(model(*six[:2]), six[2]), steps, lr=0.05)
    return right(model, six), right(model, harder)


def right(model, data):
    """The accuracy on ids, lengths and labels."""
    with rnn.evaluating(model):
        return accuracy(model(*data[:2]), data[2])


# ----------------------------------------------------------------------------------------------
# Long reviews

WORDS = ["<pad>", "good", "bad", "not", "long", "loud", "dark"] + [f"word{k}" for k in range(20)]
GOOD, BAD, NOT, FILLER = 1, 2, 3, range(7, len(WORDS))


def review(chance, longest):
    """One review: ids, and whether it is a good one."""
    length = chance.randint(20, longest)
    parts = [[chance.choice(FILLER)] for _ in range(length)]
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
    return *pad([ids for ids, _ in made]), torch.tensor([label for _, label in made])


def without(data, words):
    """The same reviews without some words, as if they were stop words."""
    ids, lengths, labels = data
    rows = [row[:length] for row, length in zip(ids, lengths)]
    return *pad([row[~torch.isin(row, torch.tensor(words))] for row in rows]), labels


def bag_of_words(train, held_out, steps=300):
    """What counting words can do: logistic regression on the counts of all words."""
    def counts(ids):
        return F.one_hot(ids, len(WORDS)).sum(1).float()[:, 1:]  # without <pad>
    model = torch.nn.Linear(len(WORDS) - 1, 2)
    fit(model, lambda: F.cross_entropy(model(counts(train[0])), train[2]), steps, lr=0.05)
    return accuracy(model(counts(held_out[0])), held_out[2])


def batches(data, epochs, bucketed=True):
    """Batches of 32, each cut to its longest review."""
    ids, lengths, labels = data
    for _ in range(epochs):
        rows = buckets(lengths, 32) if bucketed else torch.randperm(len(ids)).split(32)
        for b in rows:
            yield ids[b, : lengths[b].max()], lengths[b], labels[b]


def padding(data, bucketed):
    """What part of the symbols in an epoch's batches is padding."""
    sizes = [(ids.numel(), int(lengths.sum())) for ids, lengths, _ in batches(data, 1, bucketed)]
    return 1 - sum(valid for _, valid in sizes) / sum(all_ for all_, _ in sizes)


def learn(train, held_out, cell, layers=1, bidirectional=False, seed=0, epochs=6, lr=5e-3,
          optimizer=torch.optim.Adam):
    """Accuracy on held-out reviews, and the training losses."""
    torch.manual_seed(seed)
    model = rnn.initialize(Classifier(len(WORDS), embed=16, hidden=48, layers=layers,
                                      cell=rnn.CELLS[cell], bidirectional=bidirectional))
    source = batches(train, epochs)

    def next_loss():
        ids, lengths, labels = next(source)
        return F.cross_entropy(model(ids, lengths), labels)

    losses = fit(model, next_loss, epochs * -(-len(train[0]) // 32), lr, optimizer)
    return right(model, held_out), losses


# ----------------------------------------------------------------------------------------------
# Word vectors

MOODS, OTHERS = 150, 50  # 1 to 150: words of blame; the next 150: of praise; then 50 others


def plain_reviews(number, seed):
    """Reviews of 8 to 16 words, two fifths of them blame or praise, never both; as `reviews`."""
    chance = random.Random(seed)
    labels = [chance.randrange(2) for _ in range(number)]
    words = {label: range(1 + label * MOODS, 1 + (label + 1) * MOODS) for label in (0, 1)}
    others = range(1 + 2 * MOODS, 1 + 2 * MOODS + OTHERS)
    made = [[chance.choice(words[label] if chance.random() < 0.4 else others)
             for _ in range(chance.randint(8, 16))] for label in labels]
    return *pad(made), torch.tensor(labels)


def vectors_from_text(ids, steps=300):
    """Word vectors (V, 16): the embedding of a language model of reviews, ids (B, T), no labels."""
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(1 + 2 * MOODS + OTHERS, embed=16, hidden=32))

    def next_loss():
        rows = ids[torch.randint(len(ids), (64,))]
        logits, _ = model(rows[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], ignore_index=PAD)

    fit(model, next_loss, steps, lr=1e-2)
    return model.embedding.weight.detach()


def few_labels(train, held_out, vectors=None, freeze=False, seed=0):
    """Accuracy on held-out reviews of a classifier that begins with these word vectors, if any, and
    with `freeze` keeps them as they are."""
    torch.manual_seed(seed)
    model = rnn.initialize(Classifier(1 + 2 * MOODS + OTHERS, embed=16, hidden=16))
    if vectors is not None:
        model.embedding.weight.data[1:] = vectors[1:]  # padding stays 0
        model.embedding.weight.requires_grad_(not freeze)
    fit(model, lambda: F.cross_entropy(model(*train[:2]), train[2]), 100, lr=1e-2)
    return right(model, held_out)


def test_six_sentences_are_learnt():
    for cell in NAMES:
        assert six_sentences(cell, seed=0)[0] == 1.0


@pytest.mark.slow
def test_order_matters_and_gates_find_it():
    train, held_out = reviews(3000, 60, 0), reviews(1000, 60, 1)
    assert bag_of_words(train, held_out) < 0.6
    wrong = {cell: 1 - learn(train, held_out, cell)[0] for cell in NAMES}
    assert max(wrong["lstm"], wrong["gru"]) < 0.05
    assert wrong["rnn"] > 0.15  # it forgets the first opinions


@pytest.mark.slow
def test_stop_words_can_carry_the_meaning():
    train, held_out = reviews(2000, 40, 0), reviews(1000, 40, 1)
    assert learn(without(train, [NOT]), without(held_out, [NOT]), "gru")[0] < 0.6
    train, held_out = (without(data, list(FILLER)) for data in (train, held_out))
    assert held_out[0].shape[1] <= 12 and learn(train, held_out, "rnn")[0] > 0.9


@pytest.mark.slow
def test_sgd_needs_a_rate_far_above_adam_s():
    train, held_out = (without(reviews(n, 30, n), list(FILLER)) for n in (2000, 10))
    last = {rate: sum(learn(train, held_out, "gru", lr=rate, optimizer=torch.optim.SGD)[1][-30:])
            for rate in (1e-3, 1.0)}
    assert last[1e-3] / 30 > 0.68 > 0.5 > last[1.0] / 30


@pytest.mark.slow
def test_word_vectors_from_unlabelled_text_know_words_that_no_label_has_shown():
    vectors = vectors_from_text(plain_reviews(3000, 0)[0])
    train, held_out = plain_reviews(40, 1), plain_reviews(1000, 2)
    frozen, tuned = (few_labels(train, held_out, vectors, freeze) for freeze in (True, False))
    assert min(frozen, tuned) > few_labels(train, held_out) + 0.1


def test_buckets_hold_little_padding():
    data = reviews(1000, 100, 0)
    assert padding(data, bucketed=True) < 0.05 < 0.3 < padding(data, bucketed=False)


STACKS = {"1 layer": (1, False), "2 layers": (2, False), "3 layers": (3, False),
          "both directions": (1, True)}


def percent(accuracies):
    return "; ".join(f"{accuracy:.1%}" for accuracy in accuracies)


def main():
    study.build()
    print("Six sentences: one-hot, width 4, 60 steps, 20 seeds; the mean accuracy\n")
    results = {cell: torch.tensor([six_sentences(cell, seed) for seed in range(20)]).mean(0)
               for cell in NAMES}
    study.show_table(["cell", "the six", "harder ones"],
                     [[NAMES[cell], *(f"{part:.1%}" for part in parts)]
                      for cell, parts in results.items()])

    train, held_out = reviews(3000, 100, 0), reviews(1000, 100, 1)
    print(f"\nLong reviews: 3000 of {int(train[1].min())} to {int(train[1].max())} words to train "
          f"on, 1000 held out; counting words is right in {bag_of_words(train, held_out):.1%}")
    print(f"Padding in an epoch: {padding(train, False):.1%} in random batches, "
          f"{padding(train, True):.1%} in buckets, none of it read in packed ones\n")
    runs = {(cell, stack): [learn(train, held_out, cell, *STACKS[stack], seed) for seed in (0, 1)]
            for cell in NAMES for stack in STACKS}
    study.show_table(["cell", *STACKS], [
        [NAMES[cell], *(percent(part for part, _ in runs[cell, stack]) for stack in STACKS)]
        for cell in NAMES])

    print("\nOne layer, when words are left out")
    study.show_table(["left out", *NAMES.values()], [
        [name, *(percent(learn(without(train, words), without(held_out, words), cell, seed=seed)[0]
                         for seed in (0, 1)) for cell in NAMES)]
        for name, words in (("the word not", [NOT]), ("all filler", list(FILLER)))])

    print("\nGRU of one layer, by optimizer and rate")
    rows = []
    for optimizer, lr in (("Adam", 1e-3), ("Adam", 5e-3), ("SGD", 1e-3), ("SGD", 1.0)):
        parts, losses = zip(*(learn(train, held_out, "gru", seed=seed, lr=lr,
                                    optimizer=getattr(torch.optim, optimizer)) for seed in (0, 1)))
        last = "; ".join(f"{sum(loss[-50:]) / 50:.4f}" for loss in losses)
        rows.append([optimizer, lr, last, percent(parts)])
    study.show_table(["optimizer", "rate", "loss of the last 50 steps", "held-out"], rows)

    few, vectors = plain_reviews(40, 1), vectors_from_text(plain_reviews(3000, 0)[0])
    held_out = plain_reviews(1000, 2)
    moods = held_out[0][(held_out[0] > 0) & (held_out[0] <= 2 * MOODS)]
    print(f"\nWord vectors: 40 reviews with labels have "
          f"{torch.isin(moods, few[0]).double().mean():.0%} of the words of mood held out")
    study.show_table(["from scratch", "learnt from 3,000 reviews without labels, frozen",
                      "fine-tuned"],
                     [[percent(few_labels(few, held_out, *start, seed=seed) for seed in range(5))
                       for start in ((), (vectors, True), (vectors, False))]])
    study.save_figure("sentiment", lambda axes: draw(axes, runs), ncols=2, figsize=(10, 3.6))


def draw(axes, runs):
    """runs[cell, stack]: (accuracy, training losses) of every seed."""
    for cell, name in NAMES.items():
        losses = torch.tensor(runs[cell, "1 layer"][0][1]).unfold(0, 20, 1).mean(1)
        axes[0].plot(losses, color=study.COLOURS[cell], label=name)
        values = [[100 * part for part, _ in runs[cell, stack]] for stack in STACKS]
        axes[1].plot(values, "o", color=study.COLOURS[cell])
        axes[1].plot([sum(pair) / 2 for pair in values[:3]], color=study.COLOURS[cell])
    axes[0].set(title="Training loss of 1 layer, mean of 20 steps", xlabel="training step",
                ylabel="nats per review", ylim=(0, None))
    axes[0].legend()
    axes[1].set(title="Held-out reviews that are right, one dot a seed", ylabel="%",
                ylim=(45, 102), xticks=range(4), xticklabels=STACKS)


if __name__ == "__main__":
    main()
