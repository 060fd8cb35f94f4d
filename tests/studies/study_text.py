"""What does each part of the recipe give on text, in the same number of steps and symbols?

    python tests/studies/study_text.py [--data my.txt]         (an hour; figures/text.png)

One layer of 64 units, 250 steps of 2,048 symbols, three seeds. Every line of the first table says
what differs from the first line; its loss is exact, on 40,000 held-out symbols. Further tables: how
models write at each temperature, how far their memory reaches, and what helps, and when to stop, on
a text so short that it is soon known by heart.
"""

import copy
import math
from unittest import mock

import pytest
import study
import torch
import torch.nn.functional as F
from study import spread
from study_memory import gradient_by_distance, memory
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

import rnn

BASE = "base: LSTM of 64, BPTT 64, lr 0.02"  # clip 1, warm-up 20, orthogonal, forget bias 1
LINES = {  # the settings of `run`
    BASE: {}, "batches: random windows": {"order": "random"},
    "batches: sequential, BPTT 16": {"context": 16},
    "batches: random windows of 16": {"order": "random", "context": 16},
    "BPTT: 8": {"context": 8}, "BPTT: 32": {"context": 32}, "BPTT: 128": {"context": 128},
    "clipping: none": {"clip": math.inf},
    "clipping: 1, lr 0.1": {"lr": 0.1}, "clipping: none, lr 0.1": {"lr": 0.1, "clip": math.inf},
    "clipping: 1, RNN, lr 0.1": {"cell": "rnn", "lr": 0.1},
    "clipping: none, RNN, lr 0.1": {"cell": "rnn", "lr": 0.1, "clip": math.inf},
    "initialization: torch's uniform": {"start": "torch"},
    "initialization: orthogonal as one (4H, H) matrix": {"start": "whole"},
    "initialization: forget bias 0": {"start": 0.0},
    "initialization: forget bias 2": {"start": 2.0}, "input: one-hot": {"one_hot": True},
    "input: embedding tied to the output": {"embed": 64, "tie": True},
    "schedule: plateau, 10 evaluations": {"plateau": True, "evals": 10},
    "rate: 0.0001": {"lr": 1e-4}, "rate: 0.001": {"lr": 1e-3}, "rate: 1": {"lr": 1.0},
    "rate: no warm-up": {"warmup": 0}, "rate: warm-up of half the run": {"warmup": 125},
    "width: 16": {"hidden": 16}, "unrelated pieces of 256: sequential": {"pieces": 256},
    "unrelated pieces of 256: random windows": {"pieces": 256, "order": "random"},
    "cell: RNN": {"cell": "rnn"}, "cell: GRU": {"cell": "gru"}}
SMALL = {  # the same, on 20,000 symbols, which are soon known by heart
    "nothing": {"weight_decay": 0.0}, "weight decay 1e-4": {"weight_decay": 1e-4},
    "weight decay 0.1": {"weight_decay": 0.1},
    "dropout 0.3 on embedding and output": {"dropout": 0.3},
    "dropout 0.3 on the recurrence": {"cell": "dropped_lstm"},
    "the same, one mask for all steps": {"cell": "dropped_lstm", "variational": True},
    "GRU, nothing": {"cell": "gru", "weight_decay": 0.0},
    "GRU, dropout 0.3 on embedding and output": {"cell": "gru", "dropout": 0.3},
    "GRU, dropout 0.3 on the recurrence": {"cell": "dropped_gru"}}
STOPPING = {  # when to stop there; until then, 8,000 steps have a rate that is almost constant
    "cosine, to the end": {"evals": 40},
    "early stopping, patience 5": {"steps": 8000, "evals": 800, "patience": 5},
    "plateau, to the end": {"evals": 40, "plateau": True},
    "plateau and early stopping": {"evals": 40, "plateau": True, "patience": 5}}


class RecurrentDropout:
    """Dropout of 0.3 on the h that each step takes from the one before: a new mask at every step
    or, if the layer is variational, one for all (not for a GRU: the units that are kept would grow
    by 1 / 0.7 at every step)."""

    def forward(self, input, hx=None):  # (T, B, I)
        ones = torch.ones(input.shape[1], self.hidden_size)
        self.mask = F.dropout(ones, 0.3, self.training)
        return super().forward(input, hx)

    def step(self, gx, state, p):
        h, *c = state
        h = h * self.mask if self.variational else F.dropout(h, 0.3, self.training)
        return super().step(gx, (h, *c), p)


DROPPED = {"dropped_" + cell: type("Dropped" + cell, (RecurrentDropout, rnn.CELLS[cell]), {})
           for cell in ("lstm", "gru")}


def make(vocab, seed, start="rnn", cell="lstm", hidden=64, embed=32, **settings):
    """A CharLM. start: "rnn" (rnn.initialize), "torch" (torch's values), "whole" (orthogonal as one
    matrix instead of gate by gate), or a number, the forget gate's bias."""
    torch.manual_seed(seed)
    model = rnn.CharLM(len(vocab), embed, hidden, cell=cell, **settings)
    if start != "torch":
        rnn.initialize(model)
    if start == "whole":
        nn.init.orthogonal_(model.rnn.weight_hh_l0)
    elif isinstance(start, float):
        nn.init.constant_(model.rnn.bias_ih_l0.data[hidden : 2 * hidden], start)
    return model


def train(model, batches, val_ids, steps, lr, warmup=20, weight_decay=0.01, clip=1.0, evals=1,
          plateau=False, patience=None):
    """rnn.train with evaluations, written with torch's schedulers. Stops after `patience`
    evaluations in a row without a new lowest loss. plateau: two of them halve the rate, in place
    of the cosine. Returns (step, training loss, held-out loss) of every evaluation; the model has
    the weights of the best one."""
    optimizer = rnn.make_optimizer(model, weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if plateau:
        schedule = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        halve = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0)
    else:
        schedule = LambdaLR(optimizer, lambda n: rnn.learning_rate(1.0, warmup, n, n / steps))
    losses, history, best, stale = [], [], math.inf, 0
    for step in range(1, steps + 1):
        x, y = batches.next()
        if step == 1 or batches.order == "random":
            state = model.init_state(len(x))
        optimizer.zero_grad()
        loss, state = rnn.backward(model, x, y, state)
        if not nn.utils.clip_grad_norm_(model.parameters(), clip).isfinite():
            raise FloatingPointError
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
        if step * evals % steps >= evals:  # not yet the end of an evals-th part of the run
            continue
        value = rnn.evaluate(model, val_ids)
        history.append((step, sum(losses) / len(losses), value))
        losses, stale = [], 0 if value < best else stale + 1
        if value < best:
            best, weights = value, copy.deepcopy(model.state_dict())
        if plateau:
            halve.step(value)
        if patience and stale >= patience:
            break
    model.load_state_dict(weights)
    return history


MODEL = ("start", "cell", "hidden", "embed", "one_hot", "tie", "dropout", "variational")


@mock.patch.dict(rnn.CELLS, DROPPED)
def run(vocab, train_ids, val_ids, seed, steps, symbols=2048, pieces=None, context=64,
        order="sequential", lr=0.02, **settings):
    """Train one model on steps * symbols symbols. Returns its lowest held-out loss, infinite if the
    training broke off; the history; the model. pieces: the text is cut into pieces of this length,
    which are shuffled. Of the settings, those in MODEL are for `make`, the others for `train`."""
    model = make(vocab, seed, **{name: settings.pop(name) for name in MODEL if name in settings})
    torch.manual_seed(seed)
    if pieces:
        cut = train_ids[: len(train_ids) // pieces * pieces].view(-1, pieces)
        train_ids = cut[torch.randperm(len(cut))].flatten()
    batches = rnn.Batches(train_ids, symbols // context, context, order, seed)
    try:
        history = train(model, batches, val_ids, steps, lr, **settings)
    except FloatingPointError:
        history = [(0, math.inf, math.inf)]
    return min(value for _, _, value in history), history, model


def last_or_every(vocab, train_ids, val_ids, seed, steps, last, symbols=2048, context=64):
    """The loss of a model that learns every symbol of random windows, or only the last of each."""
    model = make(vocab, seed)
    batches = rnn.Batches(train_ids, symbols // context, context, "random", seed)

    def next_loss():
        x, y = batches.next()
        first = context - 1 if last else 0
        return rnn.cross_entropy(model(x)[0][:, first:], y[:, first:])

    study.fit(model, next_loss, steps, lr=0.02)
    return rnn.evaluate(model, val_ids)


def write(model, vocab, length, temperature):
    return "".join(rnn.generate(model, vocab, "", length, temperature, seed=0))


def repetition(text, n=20):
    """The part of a text's stretches of n symbols that have occurred in it before."""
    stretches = [text[k : k + n] for k in range(len(text) - n + 1)]
    return 1 - len(set(stretches)) / len(stretches)


def diversity(written, text):
    """What part of the words written stand in the text, and how many different ones there are."""
    known, words = set(text.split()), written.split()
    return sum(word in known for word in words) / len(words), len(set(words))


def first_loss(model, ids, starts, warm_up, length=20):
    """The mean loss on `length` symbols from each start on, after `warm_up` symbols before it."""
    rows = torch.stack([ids[s - warm_up : s + length + 1] for s in starts])
    with rnn.evaluating(model):
        logits, _ = model(rows[:, :-1])
        return rnn.cross_entropy(logits[:, warm_up:], rows[:, warm_up + 1 :]).item()


@pytest.fixture
def recall():
    """A digit, seven dashes, the same digit again; over and over. The vocabulary and the ids."""
    torch.manual_seed(0)
    text = "".join(f"{k}-------{k}\n" for k in torch.randint(8, (1200,)).tolist())
    vocab = rnn.Vocab.of(text)
    return vocab, vocab.encode(text)


def test_the_loop_is_that_of_rnn(vocab, ids):
    theirs = rnn.train(make(vocab, 0), rnn.Batches(ids, 8, 16), 30, 0.02)
    ours = train(make(vocab, 0), rnn.Batches(ids, 8, 16), ids, 30, 0.02, evals=30)
    losses = [[loss for _, loss, _ in run] for run in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_carrying_the_state_beats_random_windows(recall):
    """The digit and its echo never fit into a window of 7. Only a state that is carried over can
    tell: without it the echo costs ln 8 = 2.08 nats, every tenth symbol."""
    vocab, ids = recall
    sequential, random = (run(vocab, ids[:10000], ids[10000:], 0, 250, 448, context=7, order=order,
                              lr=1e-2, hidden=32)[0] for order in ("sequential", "random"))
    assert sequential < random - 0.05 and random > 0.95 * 2 * math.log(8) / 10


@pytest.mark.slow
def test_dropout_on_the_recurrence_hurts_where_h_is_the_memory(recall):
    """The state of a GRU is h: what dropout takes from it is lost. An LSTM's c keeps all."""
    vocab, ids = recall
    gru, dropped_gru, lstm, dropped_lstm = (
        run(vocab, ids[:10000], ids[10000:], 0, 200, 480, context=20, hidden=32, lr=1e-2,
            **SMALL[name])[0] for name in (
            "GRU, dropout 0.3 on embedding and output", "GRU, dropout 0.3 on the recurrence",
            "dropout 0.3 on embedding and output", "dropout 0.3 on the recurrence"))
    assert dropped_gru > gru + 0.1 and dropped_lstm < lstm + 0.05


def test_early_stopping_costs_no_more_and_gains_nothing():
    """The best weights are kept anyhow, so stopping early can only miss later ones."""
    vocab, ids = rnn.Vocab("0123456789"), torch.randint(10, (600,))  # to be learnt by heart only
    (full, history, _), (stopped, shorter, _) = (
        run(vocab, ids[:300], ids[300:], 0, 100, 128, context=16, hidden=16, evals=40,
            plateau=True, patience=patience) for patience in (None, 5))
    assert shorter[-1][0] < history[-1][0] == 100
    assert full <= stopped < history[-1][2]


def test_every_line_of_the_tables_runs(vocab, ids):
    for name, settings in (LINES | SMALL).items():
        loss, _, _ = run(vocab, ids[:1200], ids[1200:1400], 0, 2, 256, **settings)
        assert 0 < loss < math.log(len(vocab)) + 1, name
    assert run(vocab, ids[:1200], ids[1200:1400], 0, 5, 256, lr=1e30)[0] == math.inf  # broke off


def test_every_prediction_of_a_window_teaches_more_than_the_last(vocab, ids):
    every, last = (last_or_every(vocab, ids[:1200], ids[1200:], 0, 60, last, 512, 32)
                   for last in (False, True))
    assert every < last - 0.1


def test_greedy_text_repeats_itself_and_warming_up_helps(text, vocab, ids):
    _, _, model = run(vocab, ids[:1200], ids[1200:], 0, 60, 512, context=32, hidden=32)
    greedy, cold, hot = (write(model, vocab, 1000, temperature) for temperature in (0, 0.2, 1.5))
    assert repetition(greedy) > 0.5 > repetition(hot)
    (known_cold, words_cold), (known_hot, words_hot) = (diversity(t, text) for t in (cold, hot))
    assert known_cold > known_hot and words_cold < words_hot
    starts = range(1205, 1300)  # in the middle of words, too
    assert first_loss(model, ids, starts, 30, 1) < first_loss(model, ids, starts, 0, 1)


def main(seeds=3, steps=250):
    text = study.read_text()
    study.build()
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    split = int(0.9 * len(ids))
    train_ids, val_ids = ids[:split], ids[split:][:40_000]
    rows, results, models = [], {}, {}
    for name, settings in LINES.items():
        runs = [run(vocab, train_ids, val_ids, seed, steps, **settings) for seed in range(seeds)]
        results[name], models[name] = [loss for loss, _, _ in runs], runs[0][2]
        params = sum(p.numel() for p in models[name].parameters())
        rows.append([name, spread(results[name]), f"{params:,}"])
    print(f"\n{steps} steps of 2,048 symbols, {seeds} seeds")
    study.show_table(["", "loss, nats", "parameters"], rows)
    study.save_figure("text", lambda ax: draw(ax, results), figsize=(9, 7.5))

    print("\nLearning from every symbol of random windows of 64, or only to predict the last")
    study.show_table(["every symbol", "the last one"], [
        [spread([last_or_every(vocab, train_ids, val_ids, seed, steps, last)
                 for seed in range(seeds)]) for last in (False, True)]])
    look_at(models, vocab, val_ids, text)

    print("\n20,000 symbols, batches of 16 x 32, three seeds; the lowest of the held-out losses")
    rows = []
    for name, settings in (SMALL | STOPPING).items():
        runs = [run(vocab, train_ids[:20_000], val_ids[:20_000], seed, symbols=512, context=32,
                    **({"steps": 400, "evals": 20} | settings)) for seed in range(seeds)]
        rows.append([name, spread([loss for loss, _, _ in runs]),
                     *(spread([history[-1][k] for _, history, _ in runs], form)
                       for k, form in ((2, ".3f"), (1, ".3f"), (0, ".0f")))])
    study.show_table(["", "lowest", "last", "last in training", "steps"], rows)


def look_at(models, vocab, val_ids, text):
    """What the trained models write, what a warm-up gives, and how far their memory reaches."""
    print("\nThe first line's model writes 2,000 symbols: stretches of 20 that occurred before, "
          "words that the text has, different words")
    rows = []
    for temperature in (0, 0.5, 1.0, 1.5):
        written = write(models[BASE], vocab, 2000, temperature)
        known, words = diversity(written, text)
        rows.append([temperature, f"{repetition(written):.1%}", f"{known:.1%}", words])
    study.show_table(["temperature", "repeated", "words of the text", "different"], rows)
    print("\nIts loss on 20 symbols from anywhere, after a warm-up of so many")
    study.show_table([0, 10, 100], [
        [f"{first_loss(models[BASE], val_ids, range(1000, 30_000, 50), k):.3f}"
         for k in (0, 10, 100)]])
    print("\nEffective memory on text: the distance at which less than 1 % of the gradient is left")
    rows, x = [], val_ids[: 200 * 32].view(32, 200).t()  # (T, B)
    for name in ("cell: RNN", "cell: GRU", BASE):
        cell = models[name].config["cell"]
        rows.append([cell, *(memory(gradient_by_distance(model.rnn, model.embedding(x)))
                             for model in (make(vocab, 0, cell=cell), models[name]))])
    study.show_table(["", "at initialization", "trained"], rows)


def draw(ax, results):
    """One line for each variant. Losses far to the right are written down, not drawn."""
    mean = sum(results[BASE]) / len(results[BASE])
    edge = mean + 0.25
    for y, losses in enumerate(results.values()):
        near = [loss for loss in losses if loss < edge]
        ax.plot(near, [y] * len(near), "o", color=study.COLOURS["lstm"], alpha=0.6)
        if len(near) < len(losses):
            ax.text(edge, y, f"up to {max(losses):.2f} >", va="center", ha="right", fontsize=9)
    ax.axvline(mean, color="gray", linewidth=0.8)
    ax.set_yticks(range(len(results)), results)
    ax.invert_yaxis()
    ax.set(title="Held-out loss of each variant, one dot a seed", xlim=(None, edge),
           xlabel="nats per character; the grey line is the first variant's mean")


if __name__ == "__main__":
    main()
