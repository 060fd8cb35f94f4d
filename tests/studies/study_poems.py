"""Can a small RNN learn four Tang poems and continue each beginning? (N -> N and 1 -> N)

    python tests/studies/study_poems.py         (2 minutes; figures/poems.png)

As in a tutorial: one-hot characters, two tanh layers of 24, windows of 10 characters from anywhere
in the text. A beginning of two characters must bring back the whole poem. So must the first one
alone (1 -> N), but for the last poem's, which is also a character of the second poem.

It prints how many poems each cell knows, and what a tutorial's loop makes of them.
"""

import study
import torch

import rnn

POETS = ["Li Bai", "Wang Zhihuan", "Meng Haoran", "Liu Zongyuan"]
POEMS = ["床前明月光,疑是地上霜。举头望明月,低头思故乡。",
         "白日依山尽,黄河入海流。欲穷千里目,更上一层楼。",
         "春眠不觉晓,处处闻啼鸟。夜来风雨声,花落知多少。",
         "千山鸟飞绝,万径人踪灭。孤舟蓑笠翁,独钓寒江雪。"]
TEXT = "".join(POEMS)


def learn(cell="rnn", layers=2, context=10, steps=400, seed=0):
    """A model trained on the poems, its vocabulary, and 20 pairs (step, loss on the poems)."""
    vocab = rnn.Vocab.of(TEXT)
    ids, history = vocab.encode(TEXT), []
    torch.manual_seed(seed)
    model = rnn.initialize(rnn.CharLM(len(vocab), hidden=24, layers=layers, cell=cell,
                                      one_hot=True))
    batches = rnn.Batches(ids, 16, context, "random", seed)
    for step, _, _ in rnn.train(model, batches, steps, lr=2e-2):
        if step % (steps // 20) == 0:
            history.append((step, rnn.evaluate(model, ids)))
    return model, vocab, history


def remembered(model, vocab, known, read_twice=False):
    """For every poem its first `known` characters, and what the model writes after them.
    read_twice: as a tutorial's loop does, which warms up on all the known characters, and then
    reads the last of them once more to get the first new one."""
    written = []
    for poem in POEMS:
        prompt = poem[:known] + (poem[known - 1] if read_twice else "")
        new = rnn.generate(model, vocab, prompt, len(poem) - known, temperature=0)
        written.append(poem[:known] + "".join(new))
    return written


def foreseen(model, vocab, known):
    """The probability of every character of TEXT from the known-th on, (N - known,), for a model
    that has read only that many characters before it."""
    ids = vocab.encode(TEXT)
    with rnn.evaluating(model):
        logits, _ = model(ids.unfold(0, known, 1)[:-1])  # (N - known, known, V)
    return logits[:, -1].softmax(-1).gather(1, ids[known:, None])[:, 0]


def test_the_poems_come_back():
    model, vocab, _ = learn()
    assert remembered(model, vocab, 2) == POEMS
    assert remembered(model, vocab, 1)[:3] == POEMS[:3]
    assert not set(remembered(model, vocab, 2, read_twice=True)) & set(POEMS)
    unclear, clear = (foreseen(model, vocab, known)[:-10] for known in (1, 3))
    assert unclear.min() < 0.5 < 0.9 < clear.min()  # but for 10: no window of training begins there


def main():
    rows, curves = [], {}
    for cell in study.NAMES:
        for layers in (1, 2):
            runs = [learn(cell, layers, seed=seed) for seed in range(5)]
            curves[cell, layers] = [history for _, _, history in runs]
            whole = [sum(sum(map(str.__eq__, remembered(*run[:2], known), POEMS)) for run in runs)
                     for known in (1, 2)]
            loss = [history[-1][1] for _, _, history in runs]
            rows.append([study.NAMES[cell], layers, study.spread(loss, ".4f"),
                         *(f"{n} of 20" for n in whole)])
    study.show_table(["cell", "layers", "loss on the text, nats",
                      "whole poems after one character", "after two"], rows)
    model, vocab, _ = learn()
    for poem in remembered(model, vocab, 2):
        print(f"{poem[:2]} -> {poem}")
    print("The last known character read twice:", *remembered(model, vocab, 2, read_twice=True))
    known = torch.stack([foreseen(model, vocab, k)[4 - k :] for k in (1, 2, 3, 4)])  # (4, N - 4)
    study.save_figure("poems", lambda axes: draw(axes, curves, known), ncols=2, figsize=(10, 3.6),
                      width_ratios=(3, 4))


def draw(axes, curves, known):
    for (cell, layers), histories in curves.items():
        losses = torch.tensor([[value for _, value in history] for history in histories])
        axes[0].plot([step for step, _ in histories[0]], losses.median(0).values,
                     color=study.COLOURS[cell], linestyle="-" if layers == 2 else "--",
                     label=f"{study.NAMES[cell]}, {layers} layer{'s' * (layers > 1)}")
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
