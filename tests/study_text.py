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

import torch
from study import fit, save_figure, show_table, text_and_fused_lstm
from study_memory import gradient_by_distance, memory
from torch import nn

import rnn

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
    ("cell", "RNN", {"cell": "rnn"}), ("cell", "GRU", {"cell": "gru"})]


def make(vocab, seed, start="rnn", cell="lstm", hidden=64, embed=32, one_hot=False, tie=False):
    """A model. start: "rnn" (rnn.initialize), "torch" (torch's values), "whole" (orthogonal as one
    matrix instead of gate by gate), or a number, the forget gate's bias."""
    torch.manual_seed(seed)
    model = rnn.CharLM(len(vocab), embed, hidden, cell=cell, one_hot=one_hot, tie=tie)
    if start != "torch":
        rnn.initialize(model)
    if start == "whole":
        nn.init.orthogonal_(model.rnn.weight_hh_l0)
    elif isinstance(start, float):
        nn.init.constant_(model.rnn.bias_ih_l0.data[hidden : 2 * hidden], start)
    return model


def run(vocab, train_ids, val_ids, seed, steps, symbols=2048, context=64, order="sequential",
        lr=0.02, clip=1.0, schedule="cosine", evals=1, **model_settings):
    """Train one model on steps * symbols symbols; its exact loss, inf if training broke off; and
    the model."""
    model = make(vocab, seed, **model_settings)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        try:
            result = rnn.train(model, vocab, train_ids, val_ids, out, steps=steps, seed=seed,
                               batch=symbols // context, context=context, order=order, lr=lr,
                               clip=clip, schedule=schedule, evals=evals)
        except FloatingPointError:
            return math.inf, model
    return result["val_loss"], model


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
    losses = {order: run(vocab, ids[:10000], ids[10000:], 0, 250, 448, 7, order, lr=1e-2,
                         hidden=32)[0] for order in ("sequential", "random")}
    assert losses["sequential"] < losses["random"] - 0.05
    assert losses["random"] > 0.95 * 2 * math.log(8) / 10


def test_every_line_of_the_table_runs(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    for _, name, settings in LINES:
        loss, _ = run(vocab, ids[:1200], ids[1200:1400], 0, 2, 256,
                      **({"hidden": 64} | settings))
        assert 0 < loss < math.log(len(vocab)) + 1, name


def test_a_run_that_breaks_off_is_infinitely_bad(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    assert run(vocab, ids[:1200], ids[1200:1400], 0, 5, 256, lr=1e30)[0] == math.inf


def test_every_prediction_of_a_window_teaches_more_than_the_last(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    every, last = (last_or_every(vocab, ids[:1200], ids[1200:], 0, 60, last, 512, 32)
                   for last in (False, True))
    assert every < last - 0.1


def test_greedy_text_repeats_itself_and_warming_up_helps(text):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    loss, model = run(vocab, ids[:1200], ids[1200:], 0, 60, 512, 32, lr=2e-2, hidden=32)
    greedy, drawn = (rnn.generate(model, vocab, "Ann", 600, temperature=t, seed=0)
                     for t in (0, 1.5))
    assert repetition(greedy) > 0.5 > repetition(drawn)
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
        losses, models[name] = [loss for loss, _ in runs], runs[0][1]
        results[f"{group}: {name}" if group else "as named above"] = losses
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
    look_at(LINES[0][1], models, vocab, val_ids)
    save_figure("text", lambda ax: draw(ax, results), figsize=(9, 6))


def look_at(base_name, models, vocab, val_ids):
    """What the trained models write, what a warm-up gives, and how far their memory reaches."""
    base = models[base_name]
    print("\nThe first line's model: stretches of 20 that have occurred before, in 2,000 symbols")
    show_table(["temperature 0", "0.5", "1.0", "1.5"],
               [[f"{repetition(rnn.generate(base, vocab, '', 2000, t, seed=0)):.1%}"
                 for t in (0, 0.5, 1.0, 1.5)]])
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
    finite = [loss for losses in results.values() for loss in losses if loss < math.inf]
    edge = max(finite) + 0.05
    for y, losses in enumerate(results.values()):
        ax.plot([min(loss, edge) for loss in losses], [y] * len(losses), "o", color="tab:blue",
                alpha=0.6)
        if max(losses) == math.inf:
            ax.text(edge, y, " broke off", va="center")
    ax.axvline(statistics.mean(results["as named above"]), color="gray", linewidth=0.8)
    ax.set_yticks(range(len(results)), results)
    ax.invert_yaxis()
    ax.set_xlabel("held-out loss, nats per character; one dot a seed")


if __name__ == "__main__":
    main()
