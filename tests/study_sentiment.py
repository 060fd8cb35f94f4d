"""Sentiment, N -> 1: six short Chinese sentences, long reviews in which order matters, and word
vectors learnt beforehand.

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
GOOD, BAD, NOT, FILLER = 1, 2, 3, range(7, len(WORDS))
OPTIMIZERS = (("Adam", 1e-3), ("Adam", 5e-3), ("SGD", 1e-3), ("SGD", 1.0))


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


def without(data, words):
    """The same reviews without some words, as if they were stop words."""
    ids, lengths, labels = data
    rows = [row[:length] for row, length in zip(ids, lengths)]
    return *rnn.pad([row[~torch.isin(row, torch.tensor(words))] for row in rows]), labels


def long_reviews(train, test, cell, layers=1, bidirectional=False, seed=0, epochs=6, lr=5e-3,
                 optimizer="Adam"):
    """Accuracy on held-out reviews, and the training losses."""
    torch.manual_seed(seed)
    model = rnn.initialize(rnn.Classifier(len(WORDS), embed=16, hidden=48, layers=layers,
                                          cell=cell, bidirectional=bidirectional))
    source = batches(train, epochs)

    def next_loss():
        ids, lengths, labels = next(source)
        return F.cross_entropy(model(ids, lengths), labels)

    losses = fit(model, next_loss, epochs * -(-len(train[0]) // 32), lr,
                 getattr(torch.optim, optimizer))
    with rnn.evaluating(model):
        return rnn.accuracy(model(test[0], test[1]), test[2]), losses


def padding(data, bucketed):
    """What part of the symbols in an epoch's batches is padding."""
    sizes = [(ids.numel(), int(lengths.sum())) for ids, lengths, _ in batches(data, 1, bucketed)]
    return 1 - sum(valid for _, valid in sizes) / sum(all_ for all_, _ in sizes)


MOODS, OTHERS = 150, 50  # 1 to 150: words of blame; the next 150: of praise; then 50 others


def plain_reviews(number, seed):
    """Reviews of 8 to 16 words, two fifths of them blame or praise, never both; as `reviews`."""
    chance = random.Random(seed)
    labels = [chance.randrange(2) for _ in range(number)]
    words = {label: range(1 + label * MOODS, 1 + (label + 1) * MOODS) for label in (0, 1)}
    others = range(1 + 2 * MOODS, 1 + 2 * MOODS + OTHERS)
    made = [[chance.choice(words[label] if chance.random() < 0.4 else others)
             for _ in range(chance.randint(8, 16))] for label in labels]
    return *rnn.pad(made), torch.tensor(labels)


def vectors_from_text(ids, steps=300):
    """Word vectors (V, 16): the embedding of a language model of reviews, ids (B, T), no labels."""
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(1 + 2 * MOODS + OTHERS, embed=16, hidden=32))

    def next_loss():
        rows = ids[torch.randint(len(ids), (64,))]
        logits, _ = model(rows[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], ignore_index=rnn.PAD)

    fit(model, next_loss, steps, lr=1e-2)
    return model.embedding.weight.detach()


def few_labels(train, test, vectors=None, freeze=False, seed=0):
    """Accuracy on held-out reviews of a classifier that begins with these word vectors, if any, and
    with `freeze` keeps them as they are."""
    torch.manual_seed(seed)
    model = rnn.initialize(rnn.Classifier(1 + 2 * MOODS + OTHERS, embed=16, hidden=16))
    if vectors is not None:
        model.embedding.weight.data[1:] = vectors[1:]  # padding stays 0
        model.embedding.weight.requires_grad_(not freeze)
    fit(model, lambda: F.cross_entropy(model(*train[:2]), train[2]), 100, lr=1e-2)
    with rnn.evaluating(model):
        return rnn.accuracy(model(*test[:2]), test[2])


def test_six_sentences_are_learnt():
    for cell in NAMES:
        assert [six_sentences(cell, seed)[0] for seed in range(3)] == [1.0] * 3


def test_order_matters_and_gates_find_it():
    train, test = reviews(3000, 60, 0), reviews(1000, 60, 1)
    assert bag_of_words(train, test) < 0.6
    assert long_reviews(train, test, "lstm")[0] > 0.95
    assert long_reviews(train, test, "gru")[0] > 0.95
    assert long_reviews(train, test, "rnn")[0] < 0.75  # it forgets the first opinions


def test_stop_words_can_carry_the_meaning():
    train, test = reviews(2000, 40, 0), reviews(1000, 40, 1)
    assert long_reviews(without(train, [NOT]), without(test, [NOT]), "gru")[0] < 0.6
    plain, short = (without(data, list(FILLER)) for data in (train, test))
    assert short[0].shape[1] <= 12 and long_reviews(plain, short, "rnn")[0] > 0.9


def test_sgd_needs_a_rate_far_above_adam_s():
    train, test = (without(reviews(n, 30, n), list(FILLER)) for n in (2000, 10))
    losses = {rate: long_reviews(train, test, "gru", lr=rate, optimizer="SGD")[1]
              for rate in (1e-3, 1.0)}
    last = {rate: sum(loss[-30:]) / 30 for rate, loss in losses.items()}
    assert last[1e-3] > 0.68 > 0.5 > last[1.0]


def test_word_vectors_from_unlabelled_text_know_words_that_no_label_has_shown():
    vectors = vectors_from_text(plain_reviews(3000, 0)[0])
    train, test = plain_reviews(40, 1), plain_reviews(1000, 2)
    scratch = few_labels(train, test)
    frozen, tuned = (few_labels(train, test, vectors, freeze) for freeze in (True, False))
    assert min(frozen, tuned) > scratch + 0.1


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
               [[NAMES[cell], *(percent(accuracy for accuracy, _ in runs[cell, stack])
                                for stack in STACKS)] for cell in NAMES])
    compare_stop_words(train, test)
    compare_optimizers(train, test)
    compare_vectors()
    save_figure("sentiment", lambda axes: draw(axes, runs), ncols=2, figsize=(10, 3.6))


def percent(accuracies):
    return "; ".join(f"{accuracy:.1%}" for accuracy in accuracies)


def compare_stop_words(train, test):
    print("\nOne layer, when words are left out")
    rows = []
    for name, words in (("the word not", [NOT]), ("all filler", list(FILLER))):
        cut = without(train, words), without(test, words)
        rows.append([name, int(cut[0][1].max()),
                     *(percent(long_reviews(*cut, cell, seed=seed)[0] for seed in range(2))
                       for cell in NAMES)])
    show_table(["left out", "longest review", *NAMES.values()], rows)


def compare_optimizers(train, test):
    print("\nGRU of one layer, by optimizer and rate")
    rows = []
    for optimizer, lr in OPTIMIZERS:
        accuracies, losses = zip(*(long_reviews(train, test, "gru", seed=seed, lr=lr,
                                                optimizer=optimizer) for seed in range(2)))
        last = "; ".join(f"{sum(loss[-50:]) / 50:.4f}" for loss in losses)
        rows.append([optimizer, lr, last, percent(accuracies)])
    show_table(["optimizer", "rate", "loss of the last 50 steps", "held-out"], rows)


def compare_vectors():
    train, test = plain_reviews(40, 1), plain_reviews(1000, 2)
    vectors = vectors_from_text(plain_reviews(3000, 0)[0])
    moods = test[0][(test[0] > 0) & (test[0] <= 2 * MOODS)]
    known = torch.isin(moods, train[0]).double().mean()
    print(f"\nWord vectors: 40 reviews with labels have {known:.0%} of the words of mood held out")
    show_table(["from scratch", "learnt from 3,000 reviews without labels, frozen", "fine-tuned"],
               [[percent(few_labels(train, test, *start, seed=seed) for seed in range(5))
                 for start in ((), (vectors, True), (vectors, False))]])


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
