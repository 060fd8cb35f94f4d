"""What each part of the recipe gives on text: the same number of steps and symbols for all.

    python tests/study_text.py                 Tiny Shakespeare, as train_shakespeare.py finds it
    python tests/study_text.py --data my.txt

One layer of 64 units, 250 steps of 2,048 symbols, three seeds. The loss is exact, on the first
40,000 symbols of the held-out tenth, the state carried through. Everything that a line does not
name is as in the first line.
"""

import contextlib
import io
import math
import statistics
import sys
import tempfile
from unittest import mock

import torch
import torch.nn.functional as F
from study import COLOURS, fit, save_figure, show_table, text_and_fused_lstm
from study_memory import gradient_by_distance, memory
from torch import nn

import rnn
from train_shakespeare import train

# Lines of the table: group, name, settings of `run`.
LINES = [
    ("", "LSTM, sequential, BPTT 64, clip 1, lr 0.02, orthogonal, forget bias 1, embedding", {}),
    ("batches", "random windows", {"order": "random"}),
    ("batches", "sequential, BPTT 16", {"context": 16}),
    ("batches", "random windows of 16", {"order": "random", "context": 16}),
    ("BPTT", "8", {"context": 8}), ("BPTT", "32", {"context": 32}),
    ("BPTT", "128", {"context": 128}),
    ("clipping", "none", {"clip": math.inf}),
    ("clipping", "1, lr 0.1", {"lr": 0.1}),
    ("clipping", "none, lr 0.1", {"lr": 0.1, "clip": math.inf}),
    ("clipping", "1, RNN, lr 0.1", {"cell": "rnn", "lr": 0.1}),
    ("clipping", "none, RNN, lr 0.1", {"cell": "rnn", "lr": 0.1, "clip": math.inf}),
    ("initialization", "torch's uniform", {"start": "torch"}),
    ("initialization", "orthogonal as one (4H, H) matrix", {"start": "whole"}),
    ("initialization", "forget bias 0", {"start": 0.0}),
    ("initialization", "forget bias 2", {"start": 2.0}),
    ("input", "one-hot", {"one_hot": True}),
    ("input", "embedding tied to the output", {"embed": 64, "tie": True}),
    ("schedule", "plateau, 10 evaluations", {"schedule": "plateau", "evals": 10}),
    ("rate", "0.0001", {"lr": 1e-4}), ("rate", "0.001", {"lr": 1e-3}), ("rate", "1", {"lr": 1.0}),
    ("rate", "no warm-up", {"warmup": 0}), ("rate", "warm-up of half the run", {"warmup": 125}),
    ("width", "16", {"hidden": 16}),
    ("unrelated pieces of 256", "sequential", {"pieces": 256}),
    ("unrelated pieces of 256", "random windows", {"pieces": 256, "order": "random"}),
    ("cell", "RNN", {"cell": "rnn"}), ("cell", "GRU", {"cell": "gru"})]

BASE = "base: LSTM of 64, BPTT 64, lr 0.02"
# On 20,000 symbols, which are soon known by heart: name, settings of `run`.
SMALL = [
    ("nothing", {"weight_decay": 0.0}), ("weight decay 1e-4", {"weight_decay": 1e-4}),
    ("weight decay 0.1", {"weight_decay": 0.1}),
    ("dropout 0.3 on embedding and output", {"dropout": 0.3}),
    ("dropout 0.3 on the recurrence", {"cell": "dropped_lstm"}),
    ("the same, one mask for all steps", {"cell": "dropped_lstm", "variational": True}),
    ("GRU, nothing", {"cell": "gru", "weight_decay": 0.0}),
    ("GRU, dropout 0.3 on embedding and output", {"cell": "gru", "dropout": 0.3}),
    ("GRU, dropout 0.3 on the recurrence", {"cell": "dropped_gru"})]
# When to stop there, evaluated every ten steps: name, steps, settings. In a run of 8,000 the cosine
# has hardly begun to fall when early stopping ends it: the rate is constant.
PLATEAU = {"schedule": "plateau", "evals": 40}
STOPPING = [("cosine, to the end", 400, {"evals": 40}),
            ("early stopping, patience 5", 8000, {"evals": 800, "patience": 5}),
            ("plateau, to the end", 400, PLATEAU),
            ("plateau and early stopping", 400, PLATEAU | {"patience": 5})]


class RecurrentDropout:
    """Dropout of 0.3 on the recurrence, on the h that each step takes from the one before: by a new
    mask at every step or, if the layer is variational, by one for all steps (not for a GRU: the
    units that are kept would grow by 1 / 0.7 at every step)."""

    def forward(self, input, hx=None):  # (T, B, I)
        ones = torch.ones(input.shape[1], self.hidden_size)
        self.mask = F.dropout(ones, 0.3, self.training)
        return super().forward(input, hx)

    def step(self, gx, state, p):
        h, *c = state
        h = h * self.mask if self.variational else F.dropout(h, 0.3, self.training)
        return super().step(gx, (h, *c), p)


class DroppedLSTM(RecurrentDropout, rnn.LSTM):
    pass


class DroppedGRU(RecurrentDropout, rnn.GRU):
    pass


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


MODEL = ("start", "cell", "hidden", "embed", "one_hot", "tie", "dropout", "variational")


@mock.patch.dict(rnn.CELLS, dropped_lstm=DroppedLSTM, dropped_gru=DroppedGRU)
def run(vocab, train_ids, val_ids, seed, steps, symbols=2048, pieces=None, **settings):
    """Train one model on steps * symbols symbols; what `train` returns, and the model. If training
    broke off, the loss is infinite. pieces: the text is cut into such and they are shuffled.
    settings: those in MODEL are for `make`, the others for `train`."""
    model = make(vocab, seed, **{name: settings.pop(name) for name in MODEL if name in settings})
    options = {"context": 64, "lr": 0.02, "evals": 1} | settings
    if pieces:
        torch.manual_seed(seed)
        cut = train_ids[: len(train_ids) // pieces * pieces].view(-1, pieces)
        train_ids = cut[torch.randperm(len(cut))].flatten()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        try:
            result = train(model, vocab, train_ids, val_ids, out, steps=steps, seed=seed,
                           batch=symbols // options["context"], **options)
        except FloatingPointError:
            result = {"val_loss": math.inf, "steps": 0, "history": [(0, math.inf, math.inf)]}
    return result, model


def last_or_every(vocab, train_ids, val_ids, seed, steps, last, symbols=2048, context=64):
    """The loss of a model that learns from every symbol of random windows, or only to predict the
    last symbol of each."""
    model = make(vocab, seed)
    batches = rnn.Batches(train_ids, symbols // context, context, "random", seed)

    def next_loss():
        x, y = batches.next()
        first = context - 1 if last else 0
        return rnn.cross_entropy(model(x)[0][:, first:], y[:, first:])

    fit(model, next_loss, steps, lr=0.02)
    return rnn.evaluate(model, val_ids)


def repetition(text, n=20):
    """The part of a text's stretches of n symbols that have occurred in it before."""
    stretches = [text[k : k + n] for k in range(len(text) - n + 1)]
    return 1 - len(set(stretches)) / len(stretches)


def diversity(model, vocab, text, temperature):
    """How much of 2,000 drawn symbols are words of the text, and how many different ones."""
    known = set(text.split())
    words = rnn.generate(model, vocab, "", 2000, temperature, seed=0).split()
    return sum(word in known for word in words) / len(words), len(set(words))


def first_loss(model, ids, starts, warm_up, length=20):
    """The mean loss on `length` symbols from each start on, after so many symbols of warm-up."""
    rows = torch.stack([ids[s - warm_up : s + length + 1] for s in starts])
    with rnn.evaluating(model):
        logits, _ = model(rows[:, :-1])
        return rnn.cross_entropy(logits[:, warm_up:], rows[:, warm_up + 1 :]).item()


# ----------------------------------------------------------------------------------------------
# Small versions, for pytest


def recall_text(lines):
    """A digit, seven dashes, the same digit again; over and over."""
    torch.manual_seed(0)
    return "".join(f"{k}-------{k}\n" for k in torch.randint(8, (lines,)).tolist())


def test_carrying_the_state_beats_random_windows():
    """The digit and its echo never fit into a window of 7. Only a state that is carried over can
    tell: without it the echo costs ln 8 = 2.08 nats, every tenth symbol."""
    text = recall_text(1200)
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    losses = {order: run(vocab, ids[:10000], ids[10000:], 0, 250, 448, context=7, order=order,
                         lr=1e-2, hidden=32)[0]["val_loss"] for order in ("sequential", "random")}
    assert losses["sequential"] < losses["random"] - 0.05
    assert losses["random"] > 0.95 * 2 * math.log(8) / 10


def test_dropout_on_the_recurrence_hurts_where_h_is_the_memory():
    """The state of a GRU is h: what dropout takes from it is lost. An LSTM's c keeps all."""
    text = recall_text(1200)
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    loss = {cell: [run(vocab, ids[:10000], ids[10000:], 0, 200, 480, context=20, hidden=32, lr=1e-2,
                       **settings)[0]["val_loss"]
                   for settings in ({"cell": cell, "dropout": 0.3}, {"cell": "dropped_" + cell})]
            for cell in ("gru", "lstm")}
    outputs, recurrence = loss["gru"]
    assert recurrence > outputs + 0.1
    outputs, recurrence = loss["lstm"]
    assert recurrence < outputs + 0.05


def test_early_stopping_costs_no_more_and_gains_nothing():
    """The best weights are kept anyhow, so stopping early can only miss later ones."""
    ids = torch.randint(10, (600,))  # nothing to learn but by heart
    vocab = rnn.Vocab("0123456789")
    full, stopped = (run(vocab, ids[:300], ids[300:], 0, 100, 128, context=16, hidden=16,
                         **PLATEAU, patience=patience)[0] for patience in (None, 5))
    assert stopped["steps"] < full["steps"] == 100
    assert full["val_loss"] <= stopped["val_loss"] < full["history"][-1][2]


def test_every_line_of_the_tables_runs(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    for name, settings in [line[1:] for line in LINES] + SMALL:
        result, _ = run(vocab, ids[:1200], ids[1200:1400], 0, 2, 256, **settings)
        assert 0 < result["val_loss"] < math.log(len(vocab)) + 1, name


def test_a_run_that_breaks_off_is_infinitely_bad(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    assert run(vocab, ids[:1200], ids[1200:1400], 0, 5, 256, lr=1e30)[0]["val_loss"] == math.inf


def test_every_prediction_of_a_window_teaches_more_than_the_last(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    every, last = (last_or_every(vocab, ids[:1200], ids[1200:], 0, 60, last, 512, 32)
                   for last in (False, True))
    assert every < last - 0.1


def test_greedy_text_repeats_itself_and_warming_up_helps(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    _, model = run(vocab, ids[:1200], ids[1200:], 0, 60, 512, context=32, hidden=32)
    greedy, drawn = (rnn.generate(model, vocab, "Ann", 600, temperature=t, seed=0)
                     for t in (0, 1.5))
    assert repetition(greedy) > 0.5 > repetition(drawn)
    (known_cold, cold), (known_hot, hot) = (diversity(model, vocab, text, t) for t in (0.2, 1.5))
    assert known_cold > known_hot and cold < hot
    starts = range(1205, 1300)  # in the middle of words, too
    assert first_loss(model, ids, starts, 30, 1) < first_loss(model, ids, starts, 0, 1)


# ----------------------------------------------------------------------------------------------
# In full


def main(seeds=3, steps=250):
    text = text_and_fused_lstm()
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    split = int(0.9 * len(ids))
    train_ids, val_ids = ids[:split], ids[split:][:40_000]
    rows, results, models = [], {}, {}
    for group, name, settings in LINES:
        runs = [run(vocab, train_ids, val_ids, seed, steps, **settings) for seed in range(seeds)]
        losses, models[name] = [result["val_loss"] for result, _ in runs], runs[0][1]
        results[f"{group}: {name}" if group else BASE] = losses
        mean = statistics.mean(losses)
        params = sum(p.numel() for p in models[name].parameters())
        rows.append([group, name, f"{mean:.3f}", f"{min(losses):.3f} to {max(losses):.3f}",
                     f"{math.exp(mean):.2f}" if mean < 99 else "-", f"{params:,}"])
        print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{steps} steps of 2,048 symbols, {seeds} seeds")
    show_table(["", "", "loss, nats", "least to most", "perplexity", "parameters"], rows)

    print("\nLearning from every symbol of random windows of 64, or only to predict the last")
    show_table(["every symbol", "the last one"],
               [["; ".join(f"{last_or_every(vocab, train_ids, val_ids, seed, steps, last):.3f}"
                           for seed in range(seeds)) for last in (False, True)]])
    learn_by_heart(vocab, train_ids[:20_000], val_ids[:20_000], seeds)
    look_at(LINES[0][1], models, vocab, val_ids, text)
    save_figure("text", lambda ax: draw(ax, results), figsize=(9, 7.5))


def spread(values, form=".3f"):
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def learn_by_heart(vocab, train_ids, val_ids, seeds):
    print("\n20,000 symbols, batches of 16 x 32, 400 steps; the lowest of 20 held-out losses")
    rows = []
    for name, settings in SMALL:
        runs = [run(vocab, train_ids, val_ids, seed, 400, 512, context=32, evals=20, **settings)[0]
                for seed in range(seeds)]
        rows.append([name, *(spread(values) for values in (
            [r["val_loss"] for r in runs], [r["history"][-1][2] for r in runs],
            [r["history"][-1][1] for r in runs]))])
    show_table(["", "lowest", "last", "last in training"], rows)
    print("\nWhen to stop, on the same text")
    rows = []
    for name, steps, settings in STOPPING:
        runs = [run(vocab, train_ids, val_ids, seed, steps, 512, context=32, **settings)[0]
                for seed in range(seeds)]
        rows.append([name, spread([r["val_loss"] for r in runs]),
                     spread([r["steps"] for r in runs], ".0f")])
    show_table(["", "lowest", "steps"], rows)


def look_at(base_name, models, vocab, val_ids, text):
    """What the trained models write, what a warm-up gives, and how far their memory reaches."""
    base = models[base_name]
    print("\nThe first line's model: stretches of 20 that have occurred before, in 2,000 symbols")
    show_table(["temperature 0", "0.5", "1.0", "1.5"],
               [[f"{repetition(rnn.generate(base, vocab, '', 2000, t, seed=0)):.1%}"
                 for t in (0, 0.5, 1.0, 1.5)]])
    print("\nParts of its words that the text has, and how many different ones, in 2,000 symbols")
    parts = [diversity(base, vocab, text, t) for t in (0, 0.5, 1.0, 1.5)]
    show_table(["temperature 0", "0.5", "1.0", "1.5"], [[f"{k:.1%}, {n}" for k, n in parts]])
    starts = range(1000, 30_000, 50)
    print("\nIts loss on 20 symbols from anywhere, after a warm-up of so many")
    show_table([0, 10, 100], [[f"{first_loss(base, val_ids, starts, k):.3f}"
                               for k in (0, 10, 100)]])
    print("\nEffective memory on text: the distance at which less than 1 % of the gradient is left")
    reach = []
    for name in ("RNN", "GRU", base_name):
        cell = models[name].config["cell"]
        x = val_ids[: 200 * 32].view(32, 200).t()  # (T, B)
        norms = [gradient_by_distance(m.rnn, m.embedding(x))
                 for m in (make(vocab, 0, cell=cell), models[name])]
        reach.append([cell, *map(memory, norms), *(f"{n[100]:.1e}" for n in norms)])
    show_table(["", "at initialization", "trained", "left at 100: at initialization", "trained"],
               reach)


def draw(ax, results):
    """One line for each variant. Losses far to the right are written down, not drawn."""
    base = statistics.mean(results[BASE])
    edge = base + 0.25
    for y, losses in enumerate(results.values()):
        near = [loss for loss in losses if loss < edge]
        ax.plot(near, [y] * len(near), "o", color=COLOURS["lstm"], alpha=0.6)
        if len(near) < len(losses):
            far = max(losses)
            ax.text(edge, y, "broke off" if far == math.inf else f"up to {far:.2f} >", va="center",
                    ha="right", fontsize=9)
    ax.axvline(base, color="gray", linewidth=0.8)
    ax.set_yticks(range(len(results)), results)
    ax.invert_yaxis()
    ax.set(title="Held-out loss of each variant, one dot a seed", xlim=(None, edge),
           xlabel="nats per character; the grey line is the first variant's mean")


if __name__ == "__main__":
    main()
