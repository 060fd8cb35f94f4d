"""What the studies share: a short training loop, the text, tables, pictures."""

import argparse
import contextlib
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # rnn.py, when a study runs as a script

# The same in every picture; these colours differ for the colour-blind, too (Okabe & Ito 2008).
NAMES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
COLOURS = {"rnn": "#d55e00", "lstm": "#0072b2", "gru": "#009e73"}


def fit(model, next_loss, steps, lr, optimizer=torch.optim.Adam):
    """Train on `steps` losses, each made by next_loss(); gradients are clipped to norm 1, the rate
    falls to 0 along a cosine. Returns the losses."""
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
    """Print a table in Markdown, as the README has it."""
    lines = [head, ["---"] * len(head), *rows]
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)


def text_and_fused_lstm():
    """The text that the command line names by --data, or Tiny Shakespeare. The fused LSTM is built
    if there is a compiler."""
    import rnn
    import train_shakespeare

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a UTF-8 text; default: Tiny Shakespeare")
    path = parser.parse_args().data
    with contextlib.suppress(RuntimeError):  # without a compiler the plain path runs
        rnn.build()
    return train_shakespeare.read_text(path) if path else train_shakespeare.shakespeare()[0]


def save_figure(name, draw, **subplots):
    """draw(axes) into tests/figures/NAME.png, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: no picture {name}.png")
        return
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(layout="constrained", **subplots)
    for each in figure.axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    draw(axes)
    path = HERE / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"picture: {path}")
