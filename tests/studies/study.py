"""What the studies share: a short training loop, the text, tables, pictures."""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of examples/ and bench_lstm.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of rnn.py
import rnn

# The same in every picture. The colours also differ for the colour-blind (Okabe & Ito 2008).
NAMES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
COLOURS = {"rnn": "#d55e00", "lstm": "#0072b2", "gru": "#009e73"}


def fit(model, next_loss, steps, lr, optimizer=torch.optim.Adam):
    """Train on `steps` losses, each made by next_loss(). Gradients are clipped to norm 1, and the
    rate falls to 0 along a cosine. Returns the losses."""
    optimizer = optimizer(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def show_table(head, rows):
    """Print a table in Markdown, as tests/README.md has it."""
    lines = [head, ["---"] * len(head), *rows]
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)


def spread(values, form=".3f"):
    """The mean, the lowest and the highest value."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def build():
    """Use the fused LSTM if it can be built. Without a compiler the plain path runs."""
    with contextlib.suppress(RuntimeError, ImportError):
        rnn.build()


def read_text():
    """The text that --data names on the command line, or Tiny Shakespeare."""
    import train_shakespeare

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a UTF-8 text; default: Tiny Shakespeare")
    name = parser.parse_args().data
    text, name = ((train_shakespeare.read_text(name), name) if name
                  else train_shakespeare.shakespeare())
    print(f"{len(text):,} characters of {name}")
    return text


def save_figure(name, draw, **subplots):
    """draw(axes) into figures/NAME.png, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"no picture {name}.png: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(layout="constrained", **subplots)
    for each in figure.axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    draw(axes)
    path = Path(__file__).parent / "figures" / f"{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"picture: {path}")
