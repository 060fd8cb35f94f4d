"""Poems, N -> N and 1 -> N: a two-layer RNN learns four Tang poems and continues each beginning.

    python tests/study_poems.py

As in a tutorial: one-hot characters, two tanh layers of 24, windows of 10 characters from anywhere
in the text. A beginning of two characters must bring back the whole poem; so must the first one
alone (1 -> N), but for the last poem's: it stands in the second poem, too.
"""

import contextlib
import io
import tempfile

import torch
from study import COLOURS, NAMES, save_figure, show_table

import rnn
from train_shakespeare import train

POETS = ["Li Bai", "Wang Zhihuan", "Meng Haoran", "Liu Zongyuan"]
POEMS = ["床前明月光,疑是地上霜。举头望明月,低头思故乡。",
         "白日依山尽,黄河入海流。欲穷千里目,更上一层楼。",
         "春眠不觉晓,处处闻啼鸟。夜来风雨声,花落知多少。",
         "千山鸟飞绝,万径人踪灭。孤舟蓑笠翁,独钓寒江雪。"]
TEXT = "".join(POEMS)


def learn(cell="rnn", layers=2, context=10, steps=400, seed=0):
    """A model trained on the poems, its vocabulary, and its history: (step, loss, ...)."""
    vocab = rnn.Vocab.of(TEXT)
    ids = vocab.encode(TEXT)
    torch.manual_seed(seed)
    model = rnn.CharLM(len(vocab), hidden=24, layers=layers, cell=cell, one_hot=True)
    rnn.initialize(model)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        result = train(model, vocab, ids, ids, out, steps=steps, batch=16, context=context,
                       order="random", lr=2e-2, seed=seed, evals=20)
    return model, vocab, result["history"]


def remembered(model, vocab, known):
    """For every poem, what the model writes after its first `known` characters."""
    return [rnn.generate(model, vocab, poem[:known], len(poem) - known, temperature=0)
            for poem in POEMS]


def read_twice(model, vocab, known):
    """The same by a tutorial's loop: it warms up on all the known characters, and then reads the
    last of them once more to get the first new one."""
    written = [rnn.generate(model, vocab, poem[:known] + poem[known - 1], len(poem) - known,
                            temperature=0) for poem in POEMS]
    return [text[:known] + text[known + 1 :] for text in written]


def foreseen(model, vocab, known):
    """The probability of every character of TEXT from the known-th on, (N - known,), for a model
    that has read only so many characters before it."""
    ids = vocab.encode(TEXT)
    with rnn.evaluating(model):
        logits, _ = model(ids.unfold(0, known, 1)[:-1])  # (N - known, known, V)
    return logits[:, -1].softmax(-1).gather(1, ids[known:, None])[:, 0]


def test_the_poems_come_back():
    model, vocab, _ = learn()
    assert remembered(model, vocab, 2) == POEMS
    assert remembered(model, vocab, 1)[:3] == POEMS[:3]
    assert not set(read_twice(model, vocab, 2)) & set(POEMS)
    unclear, clear = (foreseen(model, vocab, known)[:-10] for known in (1, 3))
    assert unclear.min() < 0.5 < 0.9 < clear.min()  # but for 10: no window of training begins there


def main():
    rows, curves = [], {}
    for cell in NAMES:
        for layers in (1, 2):
            runs = [learn(cell, layers, seed=seed) for seed in range(5)]
            curves[cell, layers] = [history for _, _, history in runs]
            whole = [sum(sum(map(str.__eq__, remembered(*run[:2], known), POEMS)) for run in runs)
                     for known in (1, 2)]
            loss = [history[-1][2] for _, _, history in runs]
            rows.append([NAMES[cell], layers, f"{min(loss):.4f} to {max(loss):.4f}",
                         *(f"{n} of 20" for n in whole)])
    show_table(["cell", "layers", "loss on the text, nats", "whole poems after one character",
                "after two"], rows)
    model, vocab, _ = learn()
    for poem in remembered(model, vocab, 2):
        print(f"{poem[:2]} -> {poem}")
    print("The last known character read twice:", *read_twice(model, vocab, 2))
    known = torch.stack([foreseen(model, vocab, k)[4 - k :] for k in (1, 2, 3, 4)])  # (4, N - 4)
    save_figure("poems", lambda axes: draw(axes, curves, known), ncols=2, figsize=(10, 3.6),
                width_ratios=(3, 4))


def draw(axes, curves, known):
    for (cell, layers), histories in curves.items():
        losses = torch.tensor([[value for _, _, value in h] for h in histories])
        axes[0].plot([step for step, _, _ in histories[0]], losses.median(0).values,
                     color=COLOURS[cell], linestyle="-" if layers == 2 else "--",
                     label=f"{NAMES[cell]}, {layers} layer{'s' * (layers > 1)}")
    axes[0].set(title="Loss on four poems, median of 5 seeds", xlabel="training step",
                ylabel="nats per character", yscale="log")
    axes[0].legend(fontsize=8)
    image = axes[1].imshow(known, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    ends = torch.tensor([len(poem) for poem in POEMS]).cumsum(0) - 4
    for end in ends[:-1].tolist():
        axes[1].axvline(end - 0.5, color="black", linewidth=1)
    axes[1].grid(False)
    axes[1].set(title="Probability of each right character, RNN of 2 layers", yticks=range(4),
                yticklabels=[1, 2, 3, 4], ylabel="characters read before it",
                xticks=ends - 12, xticklabels=POETS)
    axes[1].figure.colorbar(image, ax=axes[1])


if __name__ == "__main__":
    main()
