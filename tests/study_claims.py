"""Numbers and rules that tutorials state, recomputed: which hold, and which need a correction.

    python tests/study_claims.py

Nothing here is trained, and nothing depends on the machine. How fast things are: study_speed.py.
What is learnt: study_memory.py and study_text.py.
"""

import math
import weakref

import pytest
import torch
from study import show_table
from study_memory import gradient_by_distance
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn


def count(module, names=""):
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith(names))


def counts(H=128, I=64):
    """(recurrent weights, the same with one bias, all parameters with inputs) for each layer."""
    table = {}
    for layer in (rnn.RNN(I, H), rnn.GRU(I, H), rnn.LSTM(I, H)):
        recurrent = count(layer, "weight_hh")
        table[type(layer).__name__] = recurrent, recurrent + layer.gates * H, count(layer)
    return table


def one_unit_gradient(factor, steps=100, cell="lstm"):
    """d state_100 / d state_0 of a network of a single unit. RNN: w_hh = factor, near h = 0, where
    tanh is steepest. LSTM: the bias alone sets the forget gate to factor."""
    layer = {"lstm": rnn.LSTM, "rnn": rnn.RNN}[cell](1, 1, dtype=torch.float64)
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


def state_bytes(symbols, hidden=256):
    """What an LSTM takes along from so many symbols to the next one."""
    model = rnn.CharLM(20, embed=4, hidden=hidden)
    with rnn.evaluating(model):
        _, state = model(torch.randint(20, (1, symbols)))
    return sum(s.numel() * s.element_size() for s in state)


def cell_with_gates(i, f, g, o):
    """An LSTM cell whose gates are what they are told, whatever it reads: by its biases."""
    cell = rnn.LSTMCell(3, len(f), dtype=torch.float64)
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    i, f, g, o = (torch.tensor(v, dtype=torch.float64) for v in (i, f, g, o))
    cell.bias_ih.data = torch.cat((i.logit(), f.logit(), g.atanh(), o.logit()))
    return cell


def steps_by_hand():
    """The two worked examples of a tutorial: c' (4,) of the first; c', h' of the second."""
    x = torch.tensor([0.5, -0.2, 0.8], dtype=torch.float64)
    h = torch.tensor([0.1, 0.3, -0.1, 0.2], dtype=torch.float64)
    c = torch.tensor([1.0, -0.5, 0.3, 0.7], dtype=torch.float64)
    cell = cell_with_gates(i=[0.3, 0.9, 0.2, 0.1], f=[0.9, 0.1, 0.8, 0.95],
                           g=[0.5, 0.8, -0.3, 0.1], o=[0.5] * 4)
    first = cell(x, (h, c))[1]
    cell = cell_with_gates([0.5], [0.5], [0.5], [0.5])
    cell.bias_ih.data = torch.tensor([0.47, 1.05, 0.48, 0.51], dtype=torch.float64)
    h, c = cell(x, (torch.zeros(1, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)))
    return first, c.item(), h.item()


def fill_every_bias(layer):
    """A tutorial's recipe, as it stands: 1 into the second quarter of everything called a bias.
    Returns what is added to the forget gate in the end."""
    rnn.initialize(layer)  # all biases 0, but the forget gate's
    for name, value in layer.named_parameters():
        if "bias" in name:
            value.data[len(value) // 4 : len(value) // 2] = 1.0
    total = layer.bias_ih_l0 + layer.bias_hh_l0
    return total[layer.hidden_size : 2 * layer.hidden_size]


def block_values(whole, H=128):
    """Singular values of a gate's block of W_hh, smallest, root mean square and largest: all rows
    made orthogonal as one (4H, H) matrix, or gate by gate."""
    torch.manual_seed(0)
    layer = rnn.initialize(rnn.LSTM(H, H))
    if whole:
        nn.init.orthogonal_(layer.weight_hh_l0)
    values = torch.linalg.svdvals(layer.weight_hh_l0[:H].detach())
    return values.min().item(), values.square().mean().sqrt().item(), values.max().item()


def gate_order_errors():
    """The largest differences between an LSTM written with gates in the order f, i, g, o and
    rnn.LSTM (torch's order i, f, g, o) with the same numbers, and with the blocks exchanged."""
    torch.manual_seed(0)
    layer = rnn.LSTM(3, 5, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    h = c = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(7):
        a = (x[t] @ layer.weight_ih_l0.T + h @ layer.weight_hh_l0.T
             + layer.bias_ih_l0 + layer.bias_hh_l0)
        f, i, g, o = a.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    errors = [(layer(x)[1][0][0] - h).abs().max().item()]
    for p in layer.parameters():
        f, i, g, o = p.data.chunk(4)
        p.data = torch.cat((i, f, g, o))
    return errors + [(layer(x)[1][0][0] - h).abs().max().item()]


def update_gate_errors():
    """The GRU with h' = (1 - z) h + z n and the reset gate inside the product, against
    rnn.OriginalGRU (h' = (1 - z) n + z h): with the same numbers, and with z's negated."""
    torch.manual_seed(0)
    layer = rnn.OriginalGRU(3, 5, dtype=torch.float64)
    w, u, b = (p.data for p in (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0))
    nn.init.zeros_(layer.bias_hh_l0)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    h = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(7):
        gx = x[t] @ w.T + b
        r = (gx[:, :5] + h @ u[:5].T).sigmoid()
        z = (gx[:, 5:10] + h @ u[5:10].T).sigmoid()
        h = (1 - z) * h + z * (gx[:, 10:] + (r * h) @ u[10:].T).tanh()
    errors = [(layer(x)[1][0] - h).abs().max().item()]
    for p in layer.parameters():
        p.data[5:10] *= -1  # sigmoid(-a) = 1 - sigmoid(a)
    return errors + [(layer(x)[1][0] - h).abs().max().item()]


def uniform_perplexity(symbols):
    """Of a model that prefers no symbol."""
    model = rnn.CharLM(symbols, embed=4, hidden=4)
    nn.init.zeros_(model.output.weight)
    nn.init.zeros_(model.output.bias)
    return rnn.perplexity(model, torch.randint(symbols, (500,)))


def perfect_perplexity():
    """Of a model that knows which symbol comes: there is only one."""
    model = rnn.CharLM(3, embed=4, hidden=4)
    model.output.bias.data = torch.tensor([0.0, 1000.0, 0.0])
    return rnn.perplexity(model, torch.ones(50, dtype=torch.long))


def first_to_last(steps, H=64):
    """The gradient at the first step of an RNN with torch's initial values, relative to the last:
    the mean of five seeds."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        ratios.append(gradient_by_distance(rnn.RNN(16, H), torch.randn(steps, 8, 16))[-1].item())
    return sum(ratios) / len(ratios)


def gradient_after_padding(steps=200):
    """What is left at the last word if the output is read after so many steps of padding."""
    torch.manual_seed(0)
    word, pad = torch.randn(1, 16, 100), torch.randn(100)
    x = torch.cat((word, pad.expand(steps, 16, 100)))
    return gradient_by_distance(rnn.LSTM(100, 128), x)[-1].item()


def growth(radius, nonlinearity, steps=100):
    """The gradient norm after so many steps back, when W_hh is `radius` times orthogonal."""
    torch.manual_seed(0)
    layer = rnn.initialize(rnn.RNN(8, 64, nonlinearity=nonlinearity, dtype=torch.float64))
    layer.weight_hh_l0.data *= radius
    return gradient_by_distance(layer, torch.randn(steps + 1, 8, 8, dtype=torch.float64))[-1].item()


# ----------------------------------------------------------------------------------------------
# The same, asserted


def test_parameters():
    assert counts() == {"RNN": (16_384, 16_512, 24_832), "GRU": (49_152, 49_536, 74_496),
                        "LSTM": (65_536, 66_048, 99_328)}


@pytest.mark.parametrize("cell,factor,printed", [("rnn", 0.85, 8.7e-8), ("lstm", 0.98, 0.13)])
def test_a_hundred_factors(cell, factor, printed):
    gradient = one_unit_gradient(factor, cell=cell)
    assert gradient == pytest.approx(factor**100, rel=1e-12)
    assert gradient == pytest.approx(printed, rel=0.03)


def test_forget_bias_1_does_not_begin_near_1():
    assert torch.tensor(1.0).sigmoid().item() == pytest.approx(0.731, abs=5e-4)
    assert one_unit_gradient(torch.tensor(1.0).sigmoid().item()) < 1e-13


def test_without_detach_memory_grows_by_the_same_for_every_batch():
    kept, cut = held_bytes(detach=False), held_bytes(detach=True)
    assert max(cut) - min(cut) < 0.1 * min(cut)
    growth = [b - a for a, b in zip(kept, kept[1:])]
    assert min(growth) > 0.8 * kept[0] and kept[-1] > 6 * max(cut)


def test_a_state_is_as_large_after_any_length_but_a_graph_is_not():
    assert state_bytes(10) == state_bytes(1000) == 2 * 256 * 4
    short, long = (held_bytes(detach=True, batches=1, T=T)[0] for T in (32, 64))
    assert 1.7 < long / short < 2.1


def test_without_detach_the_second_backward_fails_first():
    model, state = rnn.CharLM(20, embed=4, hidden=4), None
    ids = torch.randint(20, (2, 5))
    logits, state = model(ids, state)
    logits.sum().backward()
    logits, state = model(ids, state)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        logits.sum().backward()


def test_worked_examples():
    first, c, h = steps_by_hand()
    expected = torch.tensor([1.05, 0.67, 0.18, 0.675], dtype=torch.float64)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    assert (round(c, 3), round(h, 3)) == (0.793, 0.412)


def test_open_forget_and_shut_input_gate_keep_c():
    cell = cell_with_gates([0.5] * 4, [0.5] * 4, [0.5] * 4, [0.5] * 4)
    cell.bias_ih.data[:4], cell.bias_ih.data[4:8] = -1000.0, 1000.0  # i = 0, f = 1
    c = torch.tensor([1.0, -0.5, 0.3, 0.7], dtype=torch.float64)
    assert torch.equal(cell(torch.randn(3, dtype=torch.float64), (c, c))[1], c)


def test_filling_every_bias_gives_two():
    assert torch.equal(fill_every_bias(rnn.LSTM(3, 4)), torch.full((4,), 2.0))
    layer = rnn.initialize(rnn.LSTM(3, 4))
    assert torch.equal((layer.bias_ih_l0 + layer.bias_hh_l0)[4:8], torch.ones(4))


def test_orthogonal_rows_of_all_gates_are_not_orthogonal_gates():
    least, mean, largest = block_values(whole=True)
    assert least < 0.1 and mean == pytest.approx(0.5, abs=0.02) and largest < 1
    assert block_values(whole=False) == pytest.approx((1, 1, 1), abs=1e-5)


def test_gate_order_matters():
    same, exchanged = gate_order_errors()
    assert same > 1e-2 and exchanged < 1e-14


def test_update_gate_of_the_other_convention():
    same, negated = update_gate_errors()
    assert same > 1e-2 and negated < 1e-14


def test_uniform_perplexity_is_the_number_of_symbols():
    assert uniform_perplexity(28) == pytest.approx(28, rel=1e-5)


def test_perplexity_of_a_model_that_knows_is_1():
    assert perfect_perplexity() == pytest.approx(1, abs=1e-6)


def test_the_first_step_has_less_than_a_tenth_of_the_gradient_of_the_last():
    assert 1e-9 < first_to_last(20) < first_to_last(10) < 0.1


def test_state_keeps_its_shape_with_batch_first():
    layer = rnn.LSTM(3, 4, num_layers=2, batch_first=True)
    x, h = torch.randn(5, 7, 3), torch.zeros(2, 5, 4)
    assert layer(x, (h, h))[1][0].shape == h.shape
    wrong = h.transpose(0, 1).contiguous()
    with pytest.raises(RuntimeError, match=r"size \(2, 5, 4\).*got \[5, 2, 4\]"):
        layer(x, (wrong, wrong))


def test_packing_does_not_need_sorting():
    x, lengths = torch.randn(6, 3, 2), torch.tensor([2, 6, 4])
    with pytest.raises(RuntimeError, match="sorted"):
        pack_padded_sequence(x, lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    h = rnn.LSTM(2, 3)(packed)[1][0]
    assert h.shape == (1, 3, 3)


def test_nothing_of_a_word_is_left_after_padding():
    assert gradient_after_padding() < 1e-20


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_gradients_explode_only_from_radii_well_above_1(nonlinearity):
    """relu shuts about half of the units, tanh is flat where h is large: both take their part."""
    assert growth(0.85, nonlinearity) < growth(1.2, nonlinearity) < 1e-4
    assert growth(2.0, nonlinearity) > 1e3


# ----------------------------------------------------------------------------------------------
# In full


def rows_on_gradients():
    forget_1 = torch.tensor(1.0).sigmoid().item()
    whole, blocks = block_values(True), block_values(False)
    return [
        ["0.85^100 = 1e-7", f"one-unit RNN: {one_unit_gradient(0.85, cell='rnn'):.2e}", "right"],
        ["0.98^100 = 0.13", f"one-unit LSTM: {one_unit_gradient(0.98):.4f}", "right"],
        ["forget bias 1: f begins close to 1",
         f"f = {forget_1:.3f}; over 100 steps {one_unit_gradient(forget_1):.1e}; for f = 0.98 the "
         f"bias would have to be {math.log(0.98 / 0.02):.2f}", "too much said"],
        ["1 into every bias's forget quarter",
         f"{fill_every_bias(rnn.LSTM(3, 4))[0].item():.0f}, f = "
         f"{torch.tensor(2.0).sigmoid().item():.3f}", "gives 2"],
        ["W_hh orthogonal as one (4H, H) matrix: eigenvalues near 1",
         f"singular values of a gate's block {whole[0]:.2f} to {whole[2]:.2f}, rms {whole[1]:.2f};"
         f" gate by gate {blocks[0]:.2f} to {blocks[2]:.2f}", "wrong for the gates"],
        ["large eigenvalues of W_hh make gradients explode", "left after 100 steps at radius 0.85, "
         "1.2, 2: " + "; ".join(name + " " + ", ".join(f"{growth(radius, name):.0e}"
                                                       for radius in (0.85, 1.2, 2.0))
                                for name in ("tanh", "relu")), "only well above 1"],
        ["first_step_gradient / last_step_gradient below 0.1 for long sequences",
         "RNN, torch's initial values, 5, 10, 20, 100 steps: "
         + ", ".join(f"{first_to_last(n):.0e}" for n in (5, 10, 20, 100)), "right, soon"],
        ["three epochs at loss 0.6931 to 0.6933 on IMDB",
         f"ln 2 = {math.log(2):.4f}: chance. Gradient left at a word, read after 200 steps of "
         f"padding: {gradient_after_padding():.0e}", "nothing was learnt"],
    ]


def rows_on_cells():
    table, (first, c, h) = counts(), steps_by_hand()
    order, update = gate_order_errors(), update_gate_errors()
    return [
        ["RNN ~16 K, LSTM ~66 K parameters at width 128",
         f"recurrent part with one bias: {table['RNN'][1]:,} and {table['LSTM'][1]:,}, GRU "
         f"{table['GRU'][1]:,}; with 64 inputs and torch's two biases {table['RNN'][2]:,}, "
         f"{table['LSTM'][2]:,}, {table['GRU'][2]:,}", "right without inputs"],
        ["worked step: c'", ", ".join(f"{v:.3f}" for v in first.tolist()), "right"],
        ["worked step: 0.793, 0.412", f"c' {c:.4f}, h' {h:.4f}", "right"],
        ["an LSTM with gates f, i, g, o matches torch's",
         f"differs by {order[0]:.2g}; with blocks exchanged {order[1]:.1g}", "only when exchanged"],
        ["GRU: h' = (1 - z) h + z n",
         f"differs from torch's convention by {update[0]:.2g}; with z's parameters negated "
         f"{update[1]:.1g}", "same family"],
    ]


def rows_on_memory_and_loss():
    kept, cut = held_bytes(detach=False), held_bytes(detach=True)
    return [
        ["without detach memory grows", f"after 1, 2, 4, 8 batches "
         f"{', '.join(f'{kept[k] / 1024:.0f}' for k in (0, 1, 3, 7))} KiB; with detach "
         f"always {cut[-1] / 1024:.0f}; without retain_graph the second backward raises",
         "right with retain_graph"],
        ["RNNs need little memory for long sequences",
         f"state of width 256 after 10 symbols {state_bytes(10):,} bytes, after 10,000 "
         f"{state_bytes(10_000):,}; kept for backward through T = 32, 64, 128: "
         + ", ".join(f"{held_bytes(True, 1, T)[0] / 1024:.0f}" for T in (32, 64, 128)) + " KiB",
         "to read; training takes more with every step of BPTT"],
        ["perplexity of a uniform model over V = 28, and of a perfect one",
         f"{uniform_perplexity(28):.4f}, {perfect_perplexity():.4f}", "right"],
        ["a dashboard's loss 4.488 is perplexity 89.0, held-out 4.932",
         f"exp: {math.exp(4.488):.1f} and {math.exp(4.932):.1f}", "that of training, not held-out"],
    ]


if __name__ == "__main__":
    show_table(["claim", "measured", "verdict"],
               rows_on_gradients() + rows_on_cells() + rows_on_memory_and_loss())
