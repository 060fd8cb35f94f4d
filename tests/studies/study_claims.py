"""Numbers and rules that tutorials state, recomputed: which hold, and which need a correction?

    python tests/studies/study_claims.py         (6 seconds)

Every test computes what a claim is about, asserts what came out, and adds a row to the table that
the command prints. Nothing here is trained, and nothing depends on the machine. How fast things
are: study_speed.py. What networks learn: study_memory.py, study_text.py and the others.
"""

import math
import weakref

import pytest
import study
import torch
import torch.nn.functional as F
from examples.cells import OriginalGRU, original_gru_step
from study_memory import gradient_by_distance
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn

ROWS = []


def row(claim, measured, verdict):
    ROWS.append([claim, measured, verdict])


def forget_gate(bias):
    return torch.tensor(float(bias)).sigmoid().item()


# ----------------------------------------------------------------------------------------------
# Gradients


def one_unit_gradient(cell, factor, steps=100):
    """d state_100 / d state_0 of a network of a single unit. RNN: w_hh = factor, near h = 0, where
    tanh is steepest. LSTM: the bias alone sets the forget gate to factor."""
    layer = rnn.CELLS[cell](1, 1, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    start = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(steps, 1, 1, dtype=torch.float64)
    if cell == "rnn":
        nn.init.constant_(layer.weight_hh_l0, factor)
        end = layer(x, start)[1]
    else:
        layer.bias_ih_l0.data[1] = math.log(factor / (1 - factor))  # i, f, g, o
        end = layer(x, (torch.zeros_like(start), start))[1][1]
    return torch.autograd.grad(end, start)[0].item()


def test_a_hundred_factors():
    for cell, factor, claimed in (("rnn", 0.85, 8.7e-8), ("lstm", 0.98, 0.13)):
        gradient = one_unit_gradient(cell, factor)
        assert gradient == pytest.approx(factor**100, rel=1e-12)
        assert gradient == pytest.approx(claimed, rel=0.03)
        row(f"{factor}^100 = {claimed}", f"one-unit {cell}: {gradient:.4g}", "right")


def test_forget_bias_1_does_not_begin_near_1():
    f = forget_gate(1)
    assert f == pytest.approx(0.731, abs=5e-4) and one_unit_gradient("lstm", f) < 1e-13
    row("forget bias 1: f begins close to 1", f"f = {f:.3f}; over 100 steps "
        f"{one_unit_gradient('lstm', f):.1e}; f = 0.98 needs a bias of {math.log(0.98 / 0.02):.2f}",
        "too much said")


def test_filling_every_bias_gives_two():
    """A tutorial's recipe, as it stands: 1 into the second quarter of everything called a bias."""
    layer = rnn.initialize(rnn.LSTM(3, 4))
    assert torch.equal((layer.bias_ih_l0 + layer.bias_hh_l0)[4:8], torch.ones(4))
    for name, value in layer.named_parameters():
        if "bias" in name:
            value.data[len(value) // 4 : len(value) // 2] = 1.0
    total = (layer.bias_ih_l0 + layer.bias_hh_l0)[4:8]
    assert torch.equal(total, torch.full((4,), 2.0))
    row("1 into every bias's forget quarter", f"{total[0]:.0f}, f = {forget_gate(2):.3f}",
        "gives 2")


def test_orthogonal_rows_of_all_gates_are_not_orthogonal_gates(H=128):
    torch.manual_seed(0)
    layer = rnn.initialize(rnn.LSTM(H, H))
    by_gate = torch.linalg.svdvals(layer.weight_hh_l0[:H].detach())
    torch.testing.assert_close(by_gate, torch.ones(H), rtol=0, atol=1e-5)
    nn.init.orthogonal_(layer.weight_hh_l0)  # all 4H rows at once
    values = torch.linalg.svdvals(layer.weight_hh_l0[:H].detach())
    rms = float(values.square().mean().sqrt())
    assert values.min() < 0.1 and rms == pytest.approx(0.5, abs=0.02) and values.max() < 1
    row("W_hh orthogonal as one (4H, H) matrix: eigenvalues near 1", "singular values of a gate's "
        f"block {values.min():.2f} to {values.max():.2f}, rms {rms:.2f}; gate by gate 1.00",
        "wrong for the gates")


def growth(radius, nonlinearity, steps=100):
    """The gradient norm after so many steps back, when W_hh is `radius` times orthogonal."""
    torch.manual_seed(0)
    layer = rnn.initialize(rnn.RNN(8, 64, nonlinearity=nonlinearity, dtype=torch.float64))
    layer.weight_hh_l0.data *= radius
    return gradient_by_distance(layer, torch.randn(steps + 1, 8, 8, dtype=torch.float64))[-1].item()


def test_gradients_explode_only_from_radii_well_above_1():
    """relu shuts about half of the units, and tanh is flat where h is large: both shrink them."""
    for nonlinearity in ("tanh", "relu"):
        small, medium, large = (growth(radius, nonlinearity) for radius in (0.85, 1.2, 2.0))
        assert small < medium < 1e-4 and large > 1e3
        row("large eigenvalues of W_hh make gradients explode", f"{nonlinearity}, radius 0.85, 1.2,"
            f" 2: {small:.0e}, {medium:.0e}, {large:.0e} after 100 steps", "only well above 1")


def first_to_last(steps, H=64):
    """The gradient at the first step of an RNN with torch's initial values, relative to the last:
    the mean of five seeds."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        ratios.append(gradient_by_distance(rnn.RNN(16, H), torch.randn(steps, 8, 16))[-1].item())
    return sum(ratios) / len(ratios)


def test_the_first_step_has_less_than_a_tenth_of_the_gradient_of_the_last():
    ratios = [first_to_last(steps) for steps in (5, 10, 20, 100)]
    assert 0.1 > ratios[0] > ratios[1] > ratios[2] > 1e-9 > ratios[3]
    row("first_step_gradient / last_step_gradient below 0.1 for long sequences",
        "5, 10, 20, 100 steps: " + ", ".join(f"{ratio:.0e}" for ratio in ratios), "right, soon")


def test_nothing_of_a_word_is_left_after_padding():
    torch.manual_seed(0)
    word, pad = torch.randn(1, 16, 100), torch.randn(100)
    x = torch.cat((word, pad.expand(200, 16, 100)))
    left = gradient_by_distance(rnn.LSTM(100, 128), x)[-1].item()
    assert left < 1e-20 and round(math.log(2), 4) == 0.6931
    row("three epochs at loss 0.6931 to 0.6933 on IMDB", "ln 2 = 0.6931: chance. Gradient left at "
        f"a word, read after 200 steps of padding: {left:.0e}", "nothing was learnt")


# ----------------------------------------------------------------------------------------------
# Cells and shapes


def test_parameters():
    table = {}
    for layer in (rnn.RNN(64, 128), rnn.GRU(64, 128), rnn.LSTM(64, 128)):
        table[type(layer).__name__] = (layer.weight_hh_l0.numel() + layer.bias_hh_l0.numel(),
                                       sum(p.numel() for p in layer.parameters()))
    assert table == {"RNN": (16_512, 24_832), "GRU": (49_536, 74_496), "LSTM": (66_048, 99_328)}
    row("RNN ~16 K, LSTM ~66 K parameters at width 128",
        "recurrence with one bias / all, with 64 inputs and two biases: " + ", ".join(
            f"{name} {part:,} / {whole:,}" for name, (part, whole) in table.items()),
        "right without inputs")


def cell_with_biases(i, f, g, o):
    """An LSTM cell whose gates are what its biases make them, whatever it reads."""
    cell = rnn.LSTMCell(3, len(f), dtype=torch.float64)
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    cell.bias_ih.data = torch.cat((i, f, g, o))
    return cell


def test_worked_examples():
    x = torch.tensor([0.5, -0.2, 0.8], dtype=torch.float64)
    h = torch.tensor([0.1, 0.3, -0.1, 0.2], dtype=torch.float64)
    c = torch.tensor([1.0, -0.5, 0.3, 0.7], dtype=torch.float64)
    i, f, g, o = torch.tensor([[0.3, 0.9, 0.2, 0.1], [0.9, 0.1, 0.8, 0.95], [0.5, 0.8, -0.3, 0.1],
                               [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    first = cell_with_biases(i.logit(), f.logit(), g.atanh(), o.logit())(x, (h, c))[1]
    expected = torch.tensor([1.05, 0.67, 0.18, 0.675], dtype=torch.float64)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    row("worked step: c'", ", ".join(f"{v:.3f}" for v in first.tolist()), "right")

    biases = torch.tensor([[0.47], [1.05], [0.48], [0.51]], dtype=torch.float64)
    h, c = cell_with_biases(*biases)(x, (h[:1], torch.tensor([0.7], dtype=torch.float64)))
    assert (round(c.item(), 3), round(h.item(), 3)) == (0.793, 0.412)
    row("worked step: 0.793, 0.412", f"c' {c.item():.4f}, h' {h.item():.4f}", "right")


def test_open_forget_and_shut_input_gate_keep_c():
    biases = torch.tensor([-1000.0, 1000.0, 0.5, 0.0], dtype=torch.float64)  # i = 0, f = 1
    cell = cell_with_biases(*biases[:, None].expand(4, 4))
    c = torch.tensor([1.0, -0.5, 0.3, 0.7], dtype=torch.float64)
    assert torch.equal(cell(torch.randn(3, dtype=torch.float64), (c, c))[1], c)
    row("f = 1 and i = 0 keep c", "the same to the bit", "right")


def differences(ours, theirs, convert):
    """How far two layers with the same parameters differ, and after theirs are converted."""
    torch.manual_seed(0)
    ours, theirs = (layer(3, 5, dtype=torch.float64) for layer in (ours, theirs))
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    same = (ours(x)[0] - theirs(x)[0]).abs().max()
    for p in theirs.parameters():
        p.data = convert(p.data)
    return same, (ours(x)[0] - theirs(x)[0]).abs().max()


def test_gate_order_matters():
    class Other(rnn.LSTM):
        @staticmethod
        def step(gx, state, p):
            h, c = state
            f, i, g, o = (gx + F.linear(h, p.weight_hh, p.bias_hh)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return {"h": o.sigmoid() * c.tanh(), "c": c}

    same, exchanged = differences(rnn.LSTM, Other, lambda v: torch.cat(
        [v.chunk(4)[k] for k in (1, 0, 2, 3)]))
    assert same > 1e-2 and exchanged < 1e-14
    row("an LSTM with gates f, i, g, o matches torch's", f"differs by {same:.2g}; with blocks "
        f"exchanged {exchanged:.1g}", "only when exchanged")


def test_update_gate_of_the_other_convention():
    class Other(OriginalGRU):
        @staticmethod
        def step(gx, state, p):
            new = original_gru_step(gx, state, p)
            return {"h": (1 - new["z"]) * state[0] + new["z"] * new["n"]}

    same, negated = differences(OriginalGRU, Other, lambda v: torch.cat(
        (v[:5], -v[5:10], v[10:])))  # sigmoid(-a) = 1 - sigmoid(a)
    assert same > 1e-2 and negated < 1e-14
    row("GRU: h' = (1 - z) h + z n", f"differs from torch's convention by {same:.2g}; with z's "
        f"parameters negated {negated:.1g}", "same family")


def test_state_keeps_its_shape_with_batch_first():
    layer = rnn.LSTM(3, 4, num_layers=2, batch_first=True)
    x, h = torch.randn(5, 7, 3), torch.zeros(2, 5, 4)
    assert layer(x, (h, h))[1][0].shape == h.shape
    wrong = h.transpose(0, 1).contiguous()
    with pytest.raises(RuntimeError, match=r"size \(2, 5, 4\).*got \[5, 2, 4\]"):
        layer(x, (wrong, wrong))
    row("h_0 is (batch, layers, H) with batch_first", "always (layers, batch, H)", "wrong")


def test_packing_does_not_need_sorting():
    x, lengths = torch.randn(6, 3, 2), torch.tensor([2, 6, 4])
    with pytest.raises(RuntimeError, match="sorted"):
        pack_padded_sequence(x, lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    assert rnn.LSTM(2, 3)(packed)[1][0].shape == (1, 3, 3)
    row("packing needs sorted lengths", "not with enforce_sorted=False", "wrong")


# ----------------------------------------------------------------------------------------------
# Memory and loss


def held_bytes(detach, batches=8, T=32):
    """The bytes that the graph keeps for the backward pass, after each batch of the same model."""
    torch.manual_seed(0)
    model = rnn.initialize(rnn.CharLM(20, embed=16, hidden=32))
    state, alive, held = None, weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    for _ in range(batches):
        ids = torch.randint(20, (4, T + 1))
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            logits, state = model(ids[:, :-1], state)
            loss = rnn.cross_entropy(logits, ids[:, 1:])
        storages = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage().nbytes()
                    for s in alive}
        held.append(sum(storages.values()))
        loss.backward(retain_graph=not detach)
        if detach:
            state = rnn.map_state(torch.Tensor.detach, state)
    return held


def test_without_detach_memory_grows_by_the_same_for_every_batch():
    kept, cut = held_bytes(detach=False), held_bytes(detach=True)
    assert max(cut) - min(cut) < 0.1 * min(cut)
    assert min(b - a for a, b in zip(kept, kept[1:])) > 0.8 * kept[0] and kept[-1] > 6 * max(cut)
    row("without detach memory grows", "after 1, 2, 4, 8 batches "
        + ", ".join(f"{kept[k] / 1024:.0f}" for k in (0, 1, 3, 7))
        + f" KiB; with detach always {cut[-1] / 1024:.0f}", "right with retain_graph")


def test_without_detach_the_second_backward_fails_first():
    model, state = rnn.CharLM(20, embed=4, hidden=4), None
    ids = torch.randint(20, (2, 5))
    logits, state = model(ids, state)
    logits.sum().backward()
    logits, state = model(ids, state)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        logits.sum().backward()


def test_a_state_is_as_large_after_any_length_but_a_graph_is_not():
    model, sizes = rnn.CharLM(20, embed=4, hidden=256), []
    for symbols in (10, 1000):
        with rnn.evaluating(model):
            _, state = model(torch.randint(20, (1, symbols)))
        sizes.append(sum(s.numel() * s.element_size() for s in state))
    assert sizes == [2 * 256 * 4] * 2
    graphs = [held_bytes(True, 1, T)[0] for T in (32, 64, 128)]
    assert 1.7 < graphs[1] / graphs[0] < 2.1 > graphs[2] / graphs[1] > 1.7
    row("RNNs need little memory for long sequences", f"state of width 256: {sizes[0]:,} bytes "
        "after 10 and 1,000 symbols; kept for backward through 32, 64, 128: "
        + ", ".join(f"{graph / 1024:.0f}" for graph in graphs) + " KiB",
        "to read; training takes more with every step of BPTT")


def test_perplexities():
    model = rnn.CharLM(28, embed=4, hidden=4)
    nn.init.zeros_(model.output.weight)
    nn.init.zeros_(model.output.bias)  # it prefers no symbol
    uniform = rnn.perplexity(model, torch.randint(28, (500,)))
    model.output.bias.data[1] = 1000.0  # it knows which symbol comes: there is only one
    perfect = rnn.perplexity(model, torch.ones(50, dtype=torch.long))
    assert uniform == pytest.approx(28, rel=1e-5) and perfect == pytest.approx(1, abs=1e-6)
    row("perplexity of a uniform model over V = 28, and of a perfect one",
        f"{uniform:.4f}, {perfect:.4f}", "right")
    assert (round(math.exp(4.488), 1), round(math.exp(4.932), 1)) == (88.9, 138.7)
    row("a dashboard's loss 4.488 is perplexity 89.0, held-out 4.932",
        f"exp: {math.exp(4.488):.1f} and {math.exp(4.932):.1f}", "that of training, not held-out")


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
    study.show_table(["claim", "measured", "verdict"], ROWS)
