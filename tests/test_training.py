"""Training: rnn.py's loop, and what train_shakespeare.py puts around it, in one process."""

import contextlib
import io
import itertools
import math
import os
import signal

import pytest
import torch
from conftest import small

import rnn
from train_shakespeare import train


def run(text, out, **options):
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    model = options.pop("model", None) or small(vocab, **options.pop("config", {}))
    split = int(0.9 * len(ids))
    settings = {"batch": 4, "context": 16, "lr": 1e-2, "evals": 2}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = train(model, vocab, ids[:split], ids[split:], out, **{**settings, **options})
    return model, result, printed.getvalue()


@pytest.mark.parametrize("options", [
    {}, {"order": "random"}, {"schedule": "plateau"}, {"accumulate": 3},
    {"dtype": torch.bfloat16}, {"config": {"cell": "gru"}}, {"config": {"cell": "rnn"}},
    {"config": {"layers": 2, "dropout": 0.02}, "lr": 3e-2},
], ids=str)
def test_training_learns(text, tmp_path, options):
    _, result, printed = run(text, tmp_path, steps=200, **options)
    assert result["val_loss"] < 0.9  # the letters' frequencies alone: 2.4
    assert [h[0] for h in result["history"]] == [100, 200]
    best, vocab, _ = rnn.load(tmp_path / "best.pt")
    value = rnn.evaluate(best, vocab.encode(text)[int(0.9 * len(text)):])
    assert value == pytest.approx(result["val_loss"], abs=1e-6)
    for part in ("step 200", "loss", "ppl", "bpc", "grad", "s left", "chars/s", "held-out"):
        assert part in printed


@pytest.mark.parametrize("options", [
    {}, {"order": "random"}, {"schedule": "plateau"}, {"config": {"layers": 2, "dropout": 0.3}},
    {"config": {"cell": "gru"}}, {"config": {"tie": True, "embed": 12}}], ids=str)
def test_resumed_equals_uninterrupted(text, tmp_path, options):
    """Ended in the middle, then on from last.pt: the same weights, bit for bit."""
    whole, expected, _ = run(text, tmp_path / "whole", steps=24, evals=3, **options)
    last = rnn.load(tmp_path / "whole" / "last.pt")[0]
    asked = itertools.count(1)
    _, half, _ = run(text, tmp_path / "parts", steps=24, evals=3,
                     stop=lambda: next(asked) == 11, **options)
    assert half["steps"] == 11 and [h[0] for h in half["history"]] == [8, 11]
    model, vocab, training = rnn.load(tmp_path / "parts" / "last.pt")
    options.pop("config", None)
    torch.manual_seed(99)  # must not matter
    _, result, _ = run(text, tmp_path / "parts", steps=24, evals=3, model=model, resume=training,
                       **options)
    resumed = rnn.load(tmp_path / "parts" / "last.pt")[0]
    for (name, a), b in zip(last.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    assert [h[::2] for h in result["history"]] == [h[::2] for h in expected["history"]]


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_the_loop_alone_takes_the_same_steps(vocab, ids, tmp_path, order):
    """rnn.train, without all that train_shakespeare.train puts around the steps."""
    models = [small(vocab, layers=2, dropout=0.3) for _ in range(2)]
    batches = rnn.Batches(ids, 4, 16, order)
    taken = list(rnn.train(models[0], batches, 20, 1e-2, clip=0.1, accumulate=2))
    assert [step for step, _, _ in taken] == list(range(1, 21))
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(models[1], vocab, ids, ids, tmp_path, steps=20, batch=4, context=16,
                       order=order, lr=1e-2, clip=0.1, accumulate=2, evals=20)
    assert [loss for _, loss, _ in result["history"]] == [loss for _, loss, _ in taken]
    last = rnn.load(tmp_path / "last.pt")[0]
    for a, b in zip(last.parameters(), models[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options,message", [
    ({"steps": 0}, "steps=0"), ({"warmup": -1}, "warmup=-1"), ({"clip": 0.0}, "clip=0.0"),
    ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"),
    ({"clip": math.nan}, "clip=nan"), ({"accumulate": 0}, "accumulate=0"),
    ({"dtype": torch.float64}, "dtype=torch.float64")], ids=str)
def test_the_loop_alone_wrong_arguments(vocab, ids, options, message):
    with pytest.raises(ValueError, match=message):
        next(rnn.train(small(vocab), rnn.Batches(ids, 4, 16), **{"steps": 1, **options}))


def test_a_trainer_of_something_else(vocab, ids):
    for batches in (rnn.Batches(ids + 1, 4, 16), rnn.Batches(ids - 1, 4, 16)):
        with pytest.raises(ValueError, match=f"{len(vocab)} symbols cannot read ids from "):
            rnn.Trainer(small(vocab), batches)
    with pytest.raises(TypeError, match="needs a CharLM, got Classifier"):
        rnn.Trainer(rnn.Classifier(len(vocab), hidden=4), rnn.Batches(ids, 4, 16))
    for other in (ids.int(), ids[:, None], ids.double()):
        with pytest.raises(ValueError, match=r"ids should be \(L,\) of torch.int64, got \("):
            rnn.Batches(other, 4, 16)


def test_dropout_stays_on_in_training(vocab, ids):
    """Even if somebody leaves the model in evaluation mode between two steps."""
    losses = []
    for eval_between in (False, True):
        model = small(vocab, dropout=0.5)
        steps = rnn.train(model, rnn.Batches(ids, 4, 16), 3)
        for _, loss, _ in steps:
            model.train(not eval_between)
            losses.append(loss)
    assert losses[:3] == losses[3:]


def test_the_loop_alone_stops_where_it_diverges(vocab, ids):
    batches = rnn.Batches(ids, 4, 16)
    with pytest.raises(FloatingPointError, match="training stopped at step [2-9]: loss=.*norm=nan"):
        list(rnn.train(small(vocab), batches, 9, lr=1e38, warmup=0, clip=math.inf))


def test_accumulation_gives_the_same_gradient(vocab, ids):
    x, y = ids[:96].view(6, 16), ids[1:97].view(6, 16)
    gradients, ends = [], []
    for parts in (1, 4):
        model = small(vocab).double()
        loss, end = rnn.backpropagate(model, x, y, model.init_state(6), parts,
                                      contextlib.nullcontext())
        gradients.append([p.grad for p in model.parameters()] + [loss])
        ends.append(end)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)  # the loss is float32
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    assert not ends[0][0].requires_grad  # detached


def test_early_stopping(text, tmp_path):
    _, result, _ = run(text, tmp_path, steps=400, evals=200, patience=3, lr=0.3)
    values = [value for _, _, value in result["history"]]
    assert result["steps"] < 400 and min(values[-3:]) >= min(values) == values[-4]
    assert result["val_loss"] == values[-4]  # the best one, not the last one


def test_not_a_number_stops_with_the_reason(text, tmp_path, monkeypatch):
    plain, steps = rnn.backpropagate, []

    def failing(model, *args):
        loss, state = plain(model, *args)
        steps.append(1)
        return loss * (math.nan if len(steps) == 70 else 1), state

    monkeypatch.setattr(rnn, "backpropagate", failing)
    with pytest.raises(FloatingPointError, match="loss nan, gradient norm"):
        run(text, tmp_path, steps=100)
    good, _, training = rnn.load(tmp_path / "last.pt")
    assert training["run"]["steps"] == 50
    assert all(p.isfinite().all() for p in good.parameters())


@pytest.mark.parametrize("scale,words", [(1e-9, "gradient vanishes"), (1e6, "gradient explodes")])
def test_vanishing_and_exploding_gradients_are_noticed(text, tmp_path, monkeypatch, scale, words):
    plain = rnn.cross_entropy
    monkeypatch.setattr(rnn, "cross_entropy", lambda *a, **k: plain(*a, **k) * scale)
    assert words in run(text, tmp_path, steps=2)[2]
    monkeypatch.undo()
    assert words not in run(text, tmp_path, steps=2)[2]


def test_training_runs_for_the_seconds_it_is_given(text, tmp_path):
    _, result, _ = run(text, tmp_path, seconds=1.0)
    assert 1.0 <= result["seconds"] < 10 and len(result["history"]) == 2


def test_ctrl_c_leaves_the_last_checkpoint(text, tmp_path, monkeypatch):
    plain, steps = rnn.backpropagate, []

    def interrupting(*args):
        steps.append(1)
        if len(steps) == 11:
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(rnn, "backpropagate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path, steps=24, evals=3)
    assert rnn.load(tmp_path / "last.pt")[2]["run"]["steps"] == 8
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("options,message", [
    ({}, "either steps or seconds"), ({"steps": 2, "seconds": 2.0}, "either steps or seconds"),
    ({"steps": -1}, "steps=-1"), ({"steps": 1, "schedule": "linear"}, "got 'linear'"),
    ({"steps": 1, "order": "shuffled"}, "got 'shuffled'"),
    ({"steps": 1, "batch": 4000}, "is too short"), ({"steps": 0}, "steps=0"),
    ({"seconds": math.nan}, "seconds=nan"), ({"steps": 1, "evals": 0}, "evals=0"),
    ({"seconds": math.inf}, "above 0 and finite.*seconds=inf"),
    ({"steps": 1, "patience": 0}, "patience=0"), ({"steps": 1, "clip": -1.0}, "clip=-1.0"),
    ({"steps": 1, "lr": -1.0}, "lr=-1.0"), ({"steps": 1, "lr": math.nan}, "lr=nan"),
    ({"steps": 1, "accumulate": 0}, "accumulate=0"), ({"steps": 1, "warmup": -1}, "warmup=-1"),
    ({"steps": 1, "dtype": torch.float16}, "dtype=torch.float16"),
])
def test_train_wrong_arguments(text, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_train_needs_something_to_predict(tmp_path):
    with pytest.raises(ValueError, match="two different symbols.* got 1, 1 and 100"):
        run("a" * 1000, tmp_path, steps=1)


def test_what_cannot_be_kept_shows_before_any_work(text, tmp_path, vocab):
    class Other(rnn.CharLM):
        pass

    with pytest.raises(ValueError, match="last.pt is damaged or not a checkpoint"):
        run(text, tmp_path, steps=2, model=Other(len(vocab)))
    with pytest.raises(ValueError, match="not a checkpoint"):
        run(text, tmp_path, steps=2, notes={"path": tmp_path})
    with pytest.raises(ValueError, match=f"a model for just as many.*got {len(vocab)}, 99"):
        run(text, tmp_path, steps=2, model=rnn.CharLM(99))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_diverged_run_keeps_the_last_good_checkpoint(text, tmp_path):
    """One step so long that the weights are no longer finite, though the step's loss was."""
    with pytest.raises(FloatingPointError, match="training stopped at step"):
        run(text, tmp_path, steps=6, evals=6, lr=1e38, warmup=0, clip=math.inf)
    good, _, training = rnn.load(tmp_path / "last.pt")
    assert all(p.isfinite().all() for p in good.parameters())


def test_resume_elsewhere_and_twice(text, tmp_path):
    """Nothing better is found after resuming, into an empty folder: the best weights came along."""
    _, first, _ = run(text, tmp_path / "a", steps=20, evals=2)
    for _ in range(2):
        model, _, training = rnn.load(tmp_path / "a" / "last.pt")
        for name in ("b", "c"):  # the same dict serves twice
            _, again, _ = run(text, tmp_path / name, steps=20, evals=2, model=model,
                              resume=training)
            assert again["val_loss"] == first["val_loss"] and again["steps"] == 20
    best = rnn.load(tmp_path / "a" / "best.pt")[0]
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), model.parameters()))


def test_resumed_elsewhere_without_a_better_one(text, tmp_path):
    """The new folder has the best model all the same: the old one."""
    _, first, _ = run(text, tmp_path / "a", steps=20, evals=2)
    model, _, training = rnn.load(tmp_path / "a" / "last.pt")
    training["run"]["best"] = 0.0  # nothing can be better
    run(text, tmp_path / "c", steps=2)  # the best of another run
    old = rnn.load(tmp_path / "a" / "best.pt")[0]
    for name in ("b", "c"):
        _, result, _ = run(text, tmp_path / name, steps=22, evals=2, model=model, resume=training)
        assert result["steps"] == 22 and result["val_loss"] == 0.0
        new, _, kept = rnn.load(tmp_path / name / "best.pt")
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))
        assert kept["run"]["best"] == 0.0


def test_held_out_ids_are_looked_at_first(vocab, ids, tmp_path):
    V = len(vocab)
    for held_out, message in (([0, V], f"from 0 to {V - 1}; got 0 to {V} on cpu"),
                              ([-1, 0], f"from 0 to {V - 1}; got -1 to 0 on cpu"),
                              ([], f"two symbols to evaluate on; got {V}, {V} and 0")):
        with pytest.raises(ValueError, match=message):
            train(small(vocab), vocab, ids, torch.tensor(held_out), tmp_path / "out", steps=1,
                  batch=4)
    assert not (tmp_path / "out").exists()


def test_resume_with_less_patience_or_nothing_to_do(text, tmp_path):
    run(text, tmp_path, steps=4, evals=1, lr=1e-9, warmup=0)
    model, _, training = rnn.load(tmp_path / "last.pt")
    training["run"] |= {"stale": 3}
    _, result, _ = run(text, tmp_path, steps=8, evals=2, lr=1e-9, warmup=0, model=model,
                       resume=training, patience=2)
    assert result["steps"] == 4
    training["run"]["history"] = []
    with pytest.raises(ValueError, match="step 4 is beyond steps=3.* no evaluation was made"):
        run(text, tmp_path, steps=3, lr=1e-9, warmup=0, model=model, resume=training)


def test_only_half_written_files_of_training_are_removed(text, tmp_path):
    for name in ("best.pt.7.partial", "last.pt.7.partial", "mine.pt.7.partial"):
        (tmp_path / name).touch()
    run(text, tmp_path, steps=2, evals=1)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt", "mine.pt.7.partial"}


def test_resume_with_other_values(text, tmp_path):
    run(text, tmp_path, steps=2)
    model, _, training = rnn.load(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"batch=5 \(it was 4\), lr=0.02 \(it was 0.01\)"):
        run(text, tmp_path, steps=4, model=model, resume=training, batch=5, lr=0.02)


def test_train_into_a_folder_that_cannot_be_made(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(text, tmp_path / "file" / "out", steps=2)


def test_detaching_bounds_the_graph(vocab, ids):
    """Without detach, the loss of a later batch still depends on the first one's parameters."""
    model = small(vocab)
    x, y = ids[:32].view(2, 16), ids[1:33].view(2, 16)
    _, state = rnn.backpropagate(model, x, y, model.init_state(2), 1, contextlib.nullcontext())
    assert all(s.grad_fn is None and not s.requires_grad for s in state)
    assert model(x, state)[1][0].requires_grad
