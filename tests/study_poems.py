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
from study import save_figure, show_table

import rnn

POEMS = ["床前明月光,疑是地上霜。举头望明月,低头思故乡。",  # Li Bai
         "白日依山尽,黄河入海流。欲穷千里目,更上一层楼。",  # Wang Zhihuan
         "春眠不觉晓,处处闻啼鸟。夜来风雨声,花落知多少。",  # Meng Haoran
         "千山鸟飞绝,万径人踪灭。孤舟蓑笠翁,独钓寒江雪。"]  # Liu Zongyuan
TEXT = "".join(POEMS)
CELLS = ("rnn", "lstm", "gru")


def learn(cell="rnn", layers=2, context=10, steps=400, seed=0):
    """A model trained on the poems, its vocabulary, and its history: (step, loss, ...)."""
    vocab = rnn.Vocab.of(TEXT)
    ids = vocab.encode(TEXT)
    torch.manual_seed(seed)
    model = rnn.CharLM(len(vocab), hidden=24, layers=layers, cell=cell, one_hot=True)
    rnn.initialize(model)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        result = rnn.train(model, vocab, ids, ids, out, steps=steps, batch=16, context=context,
                           order="random", lr=2e-2, seed=seed, evals=20)
    return model, vocab, result["history"]


def remembered(model, vocab, known):
    """For every poem, what the model writes after its first `known` characters."""
    return [rnn.generate(model, vocab, poem[:known], len(poem) - known, temperature=0)
            for poem in POEMS]


def test_the_poems_come_back():
    model, vocab, _ = learn()
    assert remembered(model, vocab, 2) == POEMS
    assert remembered(model, vocab, 1)[:3] == POEMS[:3]


def main():
    rows, curves = [], {}
    for cell in CELLS:
        for layers in (1, 2):
            runs = [learn(cell, layers, seed=seed) for seed in range(5)]
            curves[cell, layers] = [history for _, _, history in runs]
            whole = [sum(sum(map(str.__eq__, remembered(*run[:2], known), POEMS)) for run in runs)
                     for known in (1, 2)]
            loss = [history[-1][2] for _, _, history in runs]
            rows.append([cell, layers, f"{min(loss):.4f} to {max(loss):.4f}",
                         *(f"{n} of 20" for n in whole)])
    show_table(["cell", "layers", "loss on the text, nats", "whole poems after one character",
                "after two"], rows)
    model, vocab, _ = learn()
    for poem in remembered(model, vocab, 2):
        print(f"{poem[:2]} -> {poem}")

    def draw(axes):
        for (cell, layers), histories in curves.items():
            losses = torch.tensor([[value for _, _, value in h] for h in histories])
            steps = [step for step, _, _ in histories[0]]
            axes.plot(steps, losses.median(0).values, label=f"{cell}, {layers} layer(s)",
                      color=f"C{CELLS.index(cell)}", linestyle="-" if layers == 2 else "--")
        axes.set(title="Four poems: loss on the text, median of 5 seeds", xlabel="step",
                 ylabel="nats per character", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)

    save_figure("poems", draw, figsize=(7, 4))


if __name__ == "__main__":
    main()
