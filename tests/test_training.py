"""Training: the rate, the optimizer, one step, and the generator `train`."""

import math

import pytest
import torch
from conftest import small
from torch import nn

import rnn


@pytest.mark.parametrize("options", [
    {}, {"order": "random"}, {"accumulate": 3}, {"dtype": torch.bfloat16}, {"cell": "gru"},
    {"cell": "rnn"}, {"layers": 2, "dropout": 0.02, "lr": 3e-2}], ids=str)
def test_training_learns(vocab, ids, options):
    model = small(vocab, **{k: v for k, v in options.items() if k in ("cell", "layers", "dropout")})
    split = int(0.9 * len(ids))
    batches = rnn.Batches(ids[:split], 4, 16, options.get("order", "sequential"))
    settings = {k: options[k] for k in ("accumulate", "dtype", "lr") if k in options}
    for _ in rnn.train(model, batches, 200, **{"lr": 1e-2, **settings}):
        pass
    assert rnn.evaluate(model, ids[split:]) < 0.9  # the letters' frequencies alone: 2.4


def test_learning_rate_by_hand():
    """A rise over the first steps times half a cosine from 1 to 0.03."""
    for step, done, expected in ((0, 0.0, 0.25), (1, 0.0, 0.5), (3, 0.0, 1.0), (99, 0.5, 0.515),
                                 (99, 1.0, 0.03), (1, 1 / 3, 0.5 * (0.03 + 0.97 * 0.75))):
        assert rnn.learning_rate(2.0, 4, step, done) == pytest.approx(2 * expected, rel=1e-12)
    assert rnn.learning_rate(2.0, 0, 0, 0.0) == 2.0  # no warmup


def test_only_matrices_decay(vocab):
    model = small(vocab, tie=True, embed=12)
    optimizer = rnn.make_optimizer(model, weight_decay=0.5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups
              for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)
    for name, p in model.named_parameters():  # tied weights come once
        assert decays[id(p)] == (0.0 if "bias" in name else 0.5), name


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_train_takes_the_steps_of_a_loop_written_out(vocab, ids, order):
    """torch's own AdamW and clipping, the loss of the whole batch at once, bit for bit."""
    models = [small(vocab, layers=2, dropout=0.3) for _ in range(2)]
    torch.manual_seed(5)
    taken = list(rnn.train(models[0], rnn.Batches(ids, 4, 16, order), 20, 1e-2, warmup=5, clip=0.1))
    assert [step for step, _, _ in taken] == list(range(1, 21))
    torch.manual_seed(5)
    model, batches, state = models[1], rnn.Batches(ids, 4, 16, order), None
    optimizer = rnn.make_optimizer(model)
    for step, loss, norm in taken:
        for group in optimizer.param_groups:
            group["lr"] = rnn.learning_rate(1e-2, 5, step - 1, (step - 1) / 20)
        x, y = batches.next()
        logits, state = model(x, None if order == "random" else state)
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        expected.backward()
        assert loss == expected.item()
        assert norm == nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()
        optimizer.step()
        state = rnn.map_state(torch.Tensor.detach, state)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_what_happens_between_two_steps_is_up_to_the_reader(vocab, ids):
    """Evaluating and sampling there changes no step, dropout included."""
    losses = []
    for look in (False, True):
        model = small(vocab, dropout=0.5)
        torch.manual_seed(5)
        for _, loss, _ in rnn.train(model, rnn.Batches(ids, 4, 16), 5):
            losses.append(loss)
            if look:
                rnn.evaluate(model, ids[:100])
                "".join(rnn.generate(model, vocab, "Ann", 5))
    assert losses[:5] == losses[5:]


def test_training_stops_where_it_diverges_before_the_weights_do(vocab, ids):
    """One step so long that the next loss is not finite: those weights are the last that change."""
    model = small(vocab)
    with pytest.raises(FloatingPointError, match="step [2-9]: .*loss.*nan.*norm.*nan"):
        for _ in rnn.train(model, rnn.Batches(ids, 4, 16), 9, lr=1e38, warmup=0, clip=math.inf):
            before = [p.clone() for p in model.parameters()]
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [2, 4, 5, 9])
def test_accumulation_gives_the_same_gradient(vocab, ids, parts):
    """With parts of equal and of unequal sizes, and more parts than rows."""
    x, y = ids[:96].view(6, 16), ids[1:97].view(6, 16)
    model = small(vocab).double()
    start = tuple(torch.rand(1, 6, 12, dtype=torch.float64) for _ in range(2))
    gradients, ends = [], []
    for accumulate in (1, parts):
        model.zero_grad()
        loss, end = rnn.backward(model, x, y, start, accumulate)
        gradients.append([p.grad.clone() for p in model.parameters()] + [loss])
        ends.append(end)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)  # the loss is float32
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_gradients_add_up_until_they_are_zeroed(vocab, ids):
    model = small(vocab)
    x, y = ids[:32].view(2, 16), ids[1:33].view(2, 16)
    rnn.backward(model, x, y, model.init_state(2))
    once = [p.grad.clone() for p in model.parameters()]
    rnn.backward(model, x, y, model.init_state(2))
    for p, g in zip(model.parameters(), once):
        torch.testing.assert_close(p.grad, 2 * g)


def test_detaching_bounds_the_graph(vocab, ids):
    """Without detach, the loss of a later batch still depends on the first one's parameters."""
    model = small(vocab)
    x, y = ids[:32].view(2, 16), ids[1:33].view(2, 16)
    _, state = rnn.backward(model, x, y, model.init_state(2))
    assert all(s.grad_fn is None and not s.requires_grad for s in state)
    assert model(x, state)[1][0].requires_grad


def test_train_carries_the_state_and_random_windows_do_not(vocab, ids):
    for order, carried in (("sequential", True), ("random", False)):
        model, starts = small(vocab), []
        model.register_forward_pre_hook(lambda _, given: starts.append(given[1][0].any().item()))
        list(rnn.train(model, rnn.Batches(ids, 4, 16, order), 3))
        assert starts == [False, carried, carried]
