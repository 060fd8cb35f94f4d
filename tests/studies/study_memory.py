"""How long do networks remember? Copy memory, the adding problem, and how far gradients reach.

    python tests/studies/study_memory.py         (about half an hour; figures/memory.png)

Copy memory: five random bits, a delay, a sign to recall, and then the five bits in order. Adding
problem (Hochreiter & Schmidhuber 1997): random numbers, two of them marked, the first one at the
beginning and the second one after the delay; the answer is the sum of the two, right if it is
nearer than 0.04.

All networks learn in the same way: the delay begins at 5 and grows by a fifth whenever a batch at
the present delay is solved, up to 200. Half of the batches have the present delay, the others a
random one up to it. With a delay of 100 from the start they learn nothing for thousands of steps.

It prints the accuracy at each delay, and the distance at which gradients are lost.
"""

import random
import statistics

import study
import torch
import torch.nn.functional as F
from torch import nn

import rnn

BITS, HIDDEN = 5, 48
DELAYS = (10, 50, 100, 200)
KINDS = {  # layer, bias of the forget gate, colour
    "RNN": (rnn.RNN, None, study.COLOURS["rnn"]), "GRU": (rnn.GRU, None, study.COLOURS["gru"]),
    "LSTM, forget bias 0": (rnn.LSTM, 0.0, "#56b4e9"),
    "LSTM, forget bias 1": (rnn.LSTM, 1.0, study.COLOURS["lstm"])}


class Network(nn.Module):
    """One layer, and a linear output at every step."""

    def __init__(self, kind, inputs, outputs, hidden=HIDDEN):
        super().__init__()
        layer, forget_bias, _ = KINDS[kind]
        self.layer, self.output = layer(inputs, hidden), nn.Linear(hidden, outputs)
        rnn.initialize(self)
        if forget_bias is not None:
            nn.init.constant_(self.layer.bias_ih_l0.data[hidden : 2 * hidden], forget_bias)

    def forward(self, x):  # (T, B, I) -> (T, B, outputs)
        return self.output(self.layer(x)[0])


class Copy:
    inputs, outputs = 4, 2  # one-hot: bit 0, bit 1, wait, recall
    solved = 0.98

    @staticmethod
    def batch(delay, B):
        """x (T, B, 4) with T = BITS + delay + BITS, and the bits (BITS, B)."""
        bits = torch.randint(2, (BITS, B))
        wait = torch.full((delay + BITS, B), 2)
        wait[delay] = 3  # recall: from this step on the bits are wanted
        return F.one_hot(torch.cat((bits, wait)), 4).float(), bits

    @staticmethod
    def score(y, bits):
        """Loss, and whether each bit is right, for outputs y (T, B, 2)."""
        y = y[-BITS:]
        return F.cross_entropy(y.flatten(0, 1), bits.flatten()), y.argmax(-1) == bits


class Adding:
    inputs, outputs = 2, 1  # a number in [0, 1), and 1 where it counts
    solved = 0.7

    @staticmethod
    def batch(delay, B):
        """x (T, B, 2) with T = delay + 10; the sums (B,)."""
        x = torch.stack((torch.rand(delay + 10, B), torch.zeros(delay + 10, B)), dim=-1)
        first = torch.randint(5, (B,))
        second = first + delay + torch.randint(5, (B,))
        for where in (first, second):
            x[where, torch.arange(B), 1] = 1.0
        return x, x.prod(-1).sum(0)

    @staticmethod
    def score(y, sums):
        error = y[-1, :, 0] - sums  # (B,)
        return error.square().mean(), error.abs() < 0.04


def learn(task, kind, seed, steps, longest, lr=1e-2, B=32):
    """Train by growing delays, for at most `steps`, until twenty batches at the longest delay were
    nine tenths right. Returns the network, and the present delay after each step."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    network = Network(kind, task.inputs, task.outputs)
    optimizer = torch.optim.Adam(network.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    present, reached, solved = 5.0, [], 0
    while len(reached) < steps and solved < 20:
        delay = int(present) if chance.random() < 0.5 else chance.randint(1, int(present))
        x, target = task.batch(delay, B)
        loss, right = task.score(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if delay == int(present) and right.float().mean() >= task.solved:
            solved += present == longest and right.float().mean().item() >= 0.9
            present = min(longest, present * 1.2)
        reached.append(int(present))
    return network, reached


@torch.no_grad()
def accuracy(task, network, delay, B=512):
    torch.manual_seed(1000 + delay)  # the same examples for all
    x, target = task.batch(delay, B)
    return task.score(network(x), target)[1].float().mean().item()


def gradient_by_distance(layer, x, state=None):
    """x (T, B, I) -> (T,): the norm of the gradient of a random function of the last h with respect
    to the state (h, c) at each distance back from it, relative to distance 0; the mean of the
    batch."""
    states = []
    for t in range(len(x)):
        _, state = layer(x[t : t + 1], state)
        states.append(state if layer.states == 2 else (state,))
        if t == 0:  # the graph begins here
            states[0] = tuple(s.detach().requires_grad_() for s in states[0])
            state = states[0] if layer.states == 2 else states[0][0]
    h = states[-1][0]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(h.shape, generator=generator)
    flat = [s for pair in states for s in pair]
    gradients = torch.autograd.grad((h * direction).sum(), flat, allow_unused=True)
    squares = [0 if g is None else g.double().square().sum(-1) for g in gradients]  # (1, B) each
    per_step = [sum(squares[k : k + layer.states]) for k in range(0, len(squares), layer.states)]
    norms = torch.cat(per_step).sqrt().mean(-1).flip(0)  # (T,), from the last step backwards
    return norms / norms[0]


def memory(norms, least=0.01):
    """How many steps back the first norm below `least` is; all of them, if there is none."""
    below = (norms < least).nonzero()
    return int(below.min()) if len(below) else len(norms)


def test_lstm_copies_over_twenty_steps_and_rnn_does_not():
    lstm, reached = learn(Copy, "LSTM, forget bias 1", seed=0, steps=700, longest=20)
    plain, never = learn(Copy, "RNN", seed=0, steps=len(reached), longest=20)
    assert accuracy(Copy, lstm, 20) >= 0.97
    assert accuracy(Copy, plain, 20) <= 0.85 and max(never) < 20


def test_gradients_of_an_rnn_vanish_first():
    torch.manual_seed(0)
    x = torch.randn(60, 8, 4)
    lstm, plain = rnn.LSTM(4, 32), rnn.initialize(rnn.RNN(4, 32))
    lstm.bias_ih_l0.data[32:64] = 4.0  # f = 0.98
    reach = memory(gradient_by_distance(lstm, x)), memory(gradient_by_distance(plain, x))
    assert reach[0] > 55 > 25 > reach[1]


def test_gradients_are_those_of_a_known_network():
    """h' = relu(0.5 h + x) with all units on: every step halves the gradient."""
    layer = rnn.RNN(3, 3, nonlinearity="relu", bias=False)
    layer.weight_ih_l0.data, layer.weight_hh_l0.data = torch.eye(3), torch.eye(3) / 2
    norms = gradient_by_distance(layer, torch.ones(10, 2, 3))
    torch.testing.assert_close(norms, 0.5 ** torch.arange(10).double())


def steps_until(delay, reached):
    return sum(d < delay for d in reached) if reached[-1] >= delay else "never"


def reach(kind, trained):
    """Gradients by distance while reading a task of 210 steps: of five layers with torch's initial
    values, five with rnn.initialize's, and of the trained network. Three lists."""
    torch.manual_seed(0)
    x = Copy.batch(200, 16)[0]
    layers = [], [], [trained.layer]
    for seed in range(5):
        torch.manual_seed(seed)
        layers[1].append(Network(kind, Copy.inputs, Copy.outputs).layer)
        layers[0].append(KINDS[kind][0](Copy.inputs, HIDDEN))
    return [[gradient_by_distance(layer, x) for layer in column] for column in layers]


def main(seeds=3, steps=1000):
    study.build()
    curves, growth, gradients = {}, {}, {}
    for task in (Copy, Adding):
        rows = []
        for kind in KINDS:
            networks, reached = zip(*(learn(task, kind, seed, steps, DELAYS[-1])
                                      for seed in range(seeds)))
            runs = [[100 * accuracy(task, net, delay) for delay in DELAYS] for net in networks]
            curves[task, kind] = list(zip(*runs))  # for each delay: one figure a seed
            growth[task, kind] = reached
            rows.append([kind, *(study.spread(a, ".0f") for a in curves[task, kind]),
                         ", ".join(str(r[-1]) for r in reached),
                         ", ".join(str(steps_until(100, r)) for r in reached)])
            if task is Copy:
                gradients[kind] = reach(kind, networks[0])
        print(f"\n{task.__name__}: right answers in %, mean (least to most) of {seeds} seeds, at "
              f"most {steps} steps of 32, width {HIDDEN}")
        study.show_table(["", *(f"delay {d}" for d in DELAYS), "longest delay reached",
                          "steps until 100"], rows)
    print("\nEffective memory: the distance at which less than 1 % of the gradient is left; 210 "
          "stands for more than 209")
    study.show_table(
        ["", "torch's initial values, 5 seeds", "rnn.initialize and this bias, 5 seeds",
         "trained to copy"],
        [[kind, *(", ".join(str(memory(n)) for n in norms) for norms in columns)]
         for kind, columns in gradients.items()])
    study.save_figure("memory", lambda axes: draw(axes.flat, curves, growth, gradients), nrows=2,
                      ncols=2, figsize=(10, 7.5))


def draw(axes, curves, growth, gradients):
    for kind, (_, _, colour) in KINDS.items():
        for ax, task in zip(axes, (Copy, Adding)):
            runs = curves[task, kind]
            ax.plot(DELAYS, [statistics.mean(a) for a in runs], "o-", color=colour, label=kind)
            ax.fill_between(DELAYS, [min(a) for a in runs], [max(a) for a in runs], color=colour,
                            alpha=0.15)
            ax.set(xlabel="delay", ylim=(0, 103), xticks=DELAYS)
        for reached in growth[Copy, kind]:
            axes[2].plot(reached, color=colour, linewidth=1.2)
        _, fresh, trained = gradients[kind]
        axes[3].semilogy(fresh[0].clamp_min(1e-12), ":", color=colour)
        axes[3].semilogy(trained[0], color=colour)
    axes[0].legend(loc="lower right")
    axes[0].set(title="Copy: bits that are right, %; by chance 50")
    axes[1].set(title="Adding: sums that are right to 0.04, %")
    axes[2].set(title="Copy: longest delay solved so far, each seed", xlabel="training step")
    axes[3].set(title="Gradient left; dotted: before training", xlabel="distance in steps",
                ylim=(1e-8, 30))
    axes[3].axhline(0.01, color="gray", linewidth=0.8)


if __name__ == "__main__":
    main()
