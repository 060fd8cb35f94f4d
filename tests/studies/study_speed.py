"""How much faster is which form? Four gates in one product, RNN, GRU and LSTM, packing, embedding.

    python tests/studies/study_speed.py [--seconds 1]         (1 minute)

It prints medians of the ratios of neighbouring runs, taken by turns, since machines are noisy. In
`..._rivals` each line is (claim, setting, what should be slower, what should be faster). The tests
check that rivals compute the same.
"""

import argparse
import functools

import pytest
import study
import torch
import torch.nn.functional as F
from bench_lstm import interleaved, ratio
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn


def four_gates(x, h, w, b):
    """An LSTM's gates, (B, 4H), by one product for each: x (B, I), h (B, H), w (4H, H + I)."""
    both = torch.cat((h, x), dim=1)  # (B, H + I)
    return torch.cat([both @ wk.T + bk for wk, bk in zip(w.chunk(4), b.chunk(4))], dim=1)


def one_product(x, h, w, b):
    return torch.cat((h, x), dim=1) @ w.T + b


def gates(form, B, I, H, train):
    """A function that computes the gates of one step, and with train their gradients, too."""
    torch.manual_seed(0)
    x, h, w, b = torch.randn(B, I), torch.randn(B, H), torch.randn(4 * H, H + I), torch.randn(4 * H)
    if not train:
        return functools.partial(torch.no_grad()(form), x, h, w, b)
    inputs = [v.requires_grad_() for v in (x, h, w, b)]
    weight = torch.randn(B, 4 * H)
    return lambda: torch.autograd.grad(form(*inputs), inputs, weight)


def gate_rivals():
    for B, I, H in ((1, 64, 128), (32, 64, 128), (32, 256, 512), (128, 256, 512)):
        for train in (False, True):
            yield ("four gates, four products / one",
                   f"B {B}, I {I}, H {H}, " + ("with gradients" if train else "forward"),
                   *(gates(form, B, I, H, train) for form in (four_gates, one_product)))


def training_step(layer, x):
    """A function that runs a layer forwards and backwards."""
    def run():
        layer.zero_grad()
        output = layer(x)[0]
        output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
        output.sum().backward()
    return run


def cell_rivals():
    class PlainLSTM(rnn.LSTM):
        def step(self, *args):  # any step but lstm_step itself takes the plain path
            return rnn.lstm_step(*args)

    fused = "fused" if rnn.fused else "plain"
    for B, T, I, H in ((32, 64, 64, 128), (32, 64, 256, 512)):
        x = torch.randn(T, B, I)
        for library, lstm, module in (("torch.nn", nn.LSTM, nn),
                                      (f"this library, LSTM {fused}", rnn.LSTM, rnn),
                                      ("this library, LSTM plain", PlainLSTM, rnn)):
            slow = training_step(lstm(I, H), x)
            for name in ("RNN", "GRU"):
                yield (f"LSTM / {name}, training", f"{library}, B {B}, T {T}, H {H}", slow,
                       training_step(getattr(module, name)(I, H), x))


def some_lengths(B, longest):
    """B lengths, evenly from 1 to the longest, in any order."""
    torch.manual_seed(0)
    return torch.linspace(1, longest, B).long()[torch.randperm(B)]


def symbol_reader(V, one_hot, B=32, T=64):
    """The cost of reading symbols only: embedding or one-hot vectors, and the product with W_ih."""
    ids = torch.randint(V, (T, B))
    weight = nn.Parameter(torch.randn(4 * 128, V if one_hot else 64))
    table = nn.Parameter(torch.randn(V, 64))

    def run():
        x = F.one_hot(ids, V).float() if one_hot else F.embedding(ids, table)
        F.linear(x, weight).sum().backward()
    return run


def input_rivals():
    x = torch.randn(100, 32, 64)
    packed = pack_padded_sequence(x, some_lengths(32, 100), enforce_sorted=False)
    for module in (nn, rnn):
        for layer in (module.LSTM(64, 128), module.GRU(64, 128)):
            yield ("padded / packed, training",
                   f"{module.__name__}.{layer}, lengths 1 to 100, half of it padding",
                   training_step(layer, x), training_step(layer, packed))
    for V in (65, 5000):
        yield ("one-hot / embedding of 64", f"V {V}, reading only", symbol_reader(V, True),
               symbol_reader(V, False))
    yield ("batch first / time first", "nn.LSTM, B 32, T 64, H 128, training",
           training_step(nn.LSTM(64, 128, batch_first=True), torch.randn(32, 64, 64)),
           training_step(nn.LSTM(64, 128), torch.randn(64, 32, 64)))
    batches = rnn.Batches(torch.randint(65, (1_000_000,)), 32, 64)
    model = rnn.CharLM(65, hidden=128)

    def step():
        x, y = batches.next()
        rnn.cross_entropy(model(x)[0], y).backward()

    yield "training step / its data", "rnn.CharLM, H 128, Batches.next", step, batches.next


def time_rivals():
    """The same rows through W_hh: each after the one before it, as a network must, or at once."""
    for B, T, H in ((1, 100, 256), (32, 100, 256)):
        x, w = torch.randn(T, B, H), torch.randn(H, H)
        yield ("step by step / all steps at once", f"product with W_hh, B {B}, T {T}, H {H}",
               lambda x=x, w=w: [row @ w for row in x], functools.partial(torch.matmul, x, w))


@pytest.mark.parametrize("train", [False, True])
def test_four_products_and_one_compute_the_same(train):
    results = [gates(form, 3, 5, 4, train)() for form in (four_gates, one_product)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layer", [rnn.LSTM(3, 4), rnn.GRU(3, 4), rnn.RNN(3, 4)])
def test_packing_leaves_out_only_padding(layer):
    lengths, x = some_lengths(6, 12), torch.randn(12, 6, 3)
    packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
    output, _ = nn.utils.rnn.pad_packed_sequence(packed)
    padded = layer(x)[0]
    for b, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, b], padded[:length, b])
    assert len(packed.data) == lengths.sum() < 0.6 * 12 * 6


def test_an_embedding_is_a_one_hot_product():
    table, ids = torch.randn(9, 4), torch.randint(9, (5,))
    torch.testing.assert_close(F.one_hot(ids, 9).float() @ table, F.embedding(ids, table))


def test_all_steps_at_once_compute_what_one_by_one_does():
    for _, _, one_by_one, at_once in time_rivals():
        torch.testing.assert_close(torch.stack(one_by_one()), at_once(), rtol=1e-4, atol=1e-4)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of the table")
    seconds = parser.parse_args().seconds
    study.build()
    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    rivals = [*gate_rivals(), *cell_rivals(), *input_rivals(), *time_rivals()]
    study.show_table(["claim", "setting", "ratio of times"],
                     [[claim, setting, f"{ratio(*interleaved([slow, fast], seconds)):.2f}"]
                      for claim, setting, slow, fast in rivals])


if __name__ == "__main__":
    main()
