"""Runs that are killed, full disks, damaged files: nothing is lost, nothing is wrong in silence.

The long versions, each some minutes:

    RNN_KILLS=50 python -m pytest -q tests/stress/test_damage.py -k killed     kills in each run
    RNN_EVERY=1 python -m pytest -q tests/stress/test_damage.py -k flipped     every byte
    RNN_LONG=200000 python -m pytest -sq tests/stress/test_damage.py -k memory   steps of training
"""

import collections
import gc
import io
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import time
import traceback

import pytest
import torch
from conftest import build_fused, write_checkpoint
from script import run as main

import rnn

KILLS = int(os.environ.get("RNN_KILLS", 3))
EVERY = int(os.environ.get("RNN_EVERY", 199))
LONG = int(os.environ.get("RNN_LONG", 600))
SMALL = ["--hidden", "6", "--embed", "4", "--batch", "4", "--context", "16", "--length", "9",
         "--dtype", "float32"]

@pytest.fixture
def folder(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


def same(a, b):
    """Whether two contents of checkpoints are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- Killed ----


def die_while_saving(r):
    """Let this process be killed at one of its saves: by half a file, or before or after one of
    the calls that make it whole."""
    module, name = r.choice([(torch, "save"), (os, "fsync"), (os, "replace")])
    real, left, after = getattr(module, name), r.randrange(12), r.random() < 0.5

    def dying(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0 and name == "save":
            buffer = io.BytesIO()
            real(arguments[0], buffer)
            arguments[1].write(buffer.getvalue()[: r.randrange(buffer.tell())])
            arguments[1].flush()
        elif left < 0 and after:
            real(*arguments, **options)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, name, dying)


def killing(folder, threads, path, kills, answer):
    """Train once in peace; then the same again and again, killed at random moments and resumed, so
    many times; and compare. In a process of its own, from which runs are forked: importing torch
    anew for each would take a hundred times as long as the run."""
    os.chdir(folder)
    torch.set_num_threads(1)  # here nothing may start threads, or forks would hang
    if path == "fused":
        rnn.build()
    else:
        rnn.fused, rnn.KERNEL = None, "plain"
    r, seen = random.Random(f"{threads} {path}"), collections.Counter()

    def begin(out, saving=False):
        pid = os.fork()
        if pid:
            return pid
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.set_num_threads(threads)
            rnn.build = lambda: None
            if saving:
                die_while_saving(r)
            if os.path.exists(f"{out}/last.pt"):
                main("--resume", f"{out}/last.pt")
            else:
                main("--data", "text.txt", "--out", out, "--steps", 60, *SMALL)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)

    def ended(pid):
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), f"a run ended with {status}"
        return status == 0

    began = time.monotonic()
    assert ended(begin("whole"))
    took, chain = time.monotonic() - began, 0
    while seen["killed"] < kills or seen["resumed to the end"] == 0:
        saving, out = r.random() < 0.5, f"chain{chain}"
        pid = begin(out, saving and seen["killed"] < kills)
        if not saving and seen["killed"] < kills:
            time.sleep(r.uniform(0, took))
            os.kill(pid, signal.SIGKILL)
        whole = ended(pid)
        seen["killed"] += not whole
        for name in ("last.pt", "best.pt"):
            if os.path.exists(f"{out}/{name}"):
                rnn.load(f"{out}/{name}")
                seen[f"{name} read"] += 1
        files = set(os.listdir(out)) - {"last.pt", "best.pt"} if os.path.exists(out) else set()
        assert all(name.endswith(".partial") for name in files), files  # only of runs that died
        seen["half a file left"] += len(files)
        if whole:
            a, b = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", out))
            for content in (a, b):
                run = content["training"]["run"]
                run["seconds"] = run["busy"] = 0.0
                run["history"] = [(s, v) for s, _, v in run["history"]]  # loss: since the start
                content["training"]["config"].pop("seconds")
            assert same(a, b)
            seen["resumed to the end"] += 1
            chain += 1
    answer.put(dict(seen))


@pytest.mark.slow
@pytest.mark.parametrize("threads,path", [(1, "plain"), (2, "fused"), (1, "fused"), (2, "plain")])
def test_a_killed_run_loses_nothing(folder, threads, path):
    if path == "fused":
        build_fused()
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=killing, args=(folder, threads, path, KILLS, answer))
    process.start()
    while process.is_alive() and answer.empty():
        process.join(0.1)
    assert not answer.empty(), "see the traceback above"
    seen = answer.get()
    process.join()
    print(threads, path, seen)
    assert seen["killed"] >= KILLS and seen["resumed to the end"] >= 1


# ---- Nowhere to write ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """The checkpoints of a run, as bytes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(text)
    main("--data", folder / "text.txt", "--steps", 20, *SMALL, "--out", folder)
    return {name: (folder / name).read_bytes() for name in ("best.pt", "last.pt")}


@pytest.fixture
def checkpoint(folder, trained):
    """whole/last.pt, beside best.pt: its path and its bytes."""
    (folder / "whole").mkdir()
    for name, content in trained.items():
        (folder / "whole" / name).write_bytes(content)
    return folder / "whole" / "last.pt", trained["last.pt"]


@pytest.mark.parametrize("part", [0, 1e-5, 0.01, 0.3, 0.7, 0.99])
def test_a_full_disk_keeps_the_old_checkpoint(checkpoint, part):
    """A limit for the size of files acts as a full disk does: the write fails."""
    path, whole = checkpoint
    model, vocab, training = rnn.load(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * len(whole)), before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*last\.pt: "):
            rnn.save(path, model, vocab, **training)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole and sorted(os.listdir("whole")) == ["best.pt", "last.pt"]


def test_a_full_file_system(checkpoint):
    path, whole = checkpoint
    os.mkdir("small")
    if os.system("mount -t tmpfs -o size=64k tmpfs small 2> /dev/null"):
        pytest.skip("only root can mount a small file system")
    try:
        model, vocab, training = rnn.load(path)
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*small/a\.pt: "):
            for size in range(1000):  # until it is full
                rnn.save("small/a.pt", model, vocab, **training, more=torch.zeros(size * 1000))
        assert rnn.load("small/a.pt")[2]["more"].numel() == (size - 1) * 1000
        assert os.listdir("small") == ["a.pt"]
    finally:
        os.system("umount small")


def test_a_folder_that_may_only_be_read(checkpoint):
    path, whole = checkpoint
    os.chmod("whole", 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)  # for root, permissions would not count
    try:
        if os.access("whole", os.W_OK, effective_ids=True):
            pytest.skip("permissions do not count here")
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*last\.pt: .*denied"):
            rnn.save(path, rnn.CharLM(2), rnn.Vocab("ab"))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        os.chmod("whole", 0o755)
    assert path.read_bytes() == whole


# ---- Damaged checkpoints ----


def test_flipped_bits_are_seen(checkpoint):
    """torch.load alone takes most of them for other weights, and the checksums of a ZIP file do
    not cover the list of its parts."""
    path, whole = checkpoint
    flips = range(random.randrange(EVERY), len(whole), EVERY)
    for k in flips:
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1 << k % 8]) + whole[k + 1 :])
        with pytest.raises(ValueError, match="last.pt is damaged or not a checkpoint"):
            rnn.load(path)
    print(f"{len(flips)} flips in {len(whole)} bytes")


HUGE = 10**9


@pytest.mark.parametrize("changes", [
    *({"config": {name: HUGE}} for name in ("hidden", "embed", "vocab_size", "layers")),
    {"config": {"hidden": 40_000}}, {"config": {"layers": 1.5}}, {"config": {"cell": "x"}},
    {"config": {"further": 1}}, {"config": {"hidden": "6"}}, {"config": 3}, {"symbols": 3},
    {"symbols": list(range(13))}, {"symbols": None},
    {"weights": {}}, {"weights": None}, {"weights": {"output.weight": "x"}},
    {"weights": {"output.weight": torch.zeros(3)}}], ids=str)
def test_content_that_does_not_fit(checkpoint, changes):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        both = isinstance(value, dict) and value and isinstance(content[name], dict)
        content[name] = {**content[name], **value} if both else value
    write_checkpoint(content, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="last.pt is damaged or not a checkpoint of rnn.py: "
                                         "(?!.*checksum)"):
        rnn.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def drop(*keys):
    def change(training):
        for key in keys[:-1]:
            training = training[key]
        del training[keys[-1]]
    return change


def put(value, *keys):
    def change(training):
        for key in keys[:-1]:
            training = training[key]
        training[keys[-1]] = value
    return change


@pytest.mark.parametrize("change", [
    drop("config"), drop("optimizer"), drop("run"), drop("state"), drop("position"),
    drop("config", "lr"), drop("config", "sha256"), put("4", "config", "batch"), put(3, "config"),
    put(None, "config"), put("4", "config", "sha256"), put(None, "run"), put({}, "optimizer"),
    put([], "optimizer", "param_groups"), put("x", "state"), lambda training: training.clear()])
def test_a_damaged_run_shows_before_any_work(checkpoint, capsys, change):
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    change(content["training"])
    write_checkpoint(content, path)
    damaged = path.read_bytes()
    capsys.readouterr()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        main("--resume", path, "--data", "text.txt", "--steps", 40)
    assert "held-out" not in capsys.readouterr().out and path.read_bytes() == damaged


def test_a_model_without_a_run(folder):
    rnn.save("young.pt", rnn.CharLM(2, hidden=4), rnn.Vocab("ab"))
    with pytest.raises(ValueError, match="cannot resume young.pt: it is not the last.pt of a run"):
        main("--resume", "young.pt", "--data", "text.txt")
    assert not os.path.exists("out")


# ---- Texts ----


def test_texts_around_the_shortest(folder, capsys):
    needed = 4 * 16 + 1
    for length in (*range(6), *range(70, 76), 130):
        with open("short.txt", "w") as file:
            file.write(("abc" * length)[:length])
        enough = int(0.9 * length) >= needed
        try:
            main("--data", "short.txt", "--steps", 1, *SMALL, "--out", f"out{length}")
            assert enough
        except ValueError as error:
            assert not enough and re.search("text|symbol", str(error)), error
        assert os.path.exists(f"out{length}") == enough


def test_the_shortest_texts_of_all(folder):
    """Two symbols to learn from and two to evaluate on."""
    for length in range(5):
        with open("short.txt", "w") as file:
            file.write("abcd"[:length])
        arguments = ["--data", "short.txt", "--steps", 1, *SMALL, "--batch", 1, "--context", 1]
        if length < 4:
            with pytest.raises(ValueError):
                main(*arguments)
            assert not os.path.exists("out")
        else:
            main(*arguments)
            assert rnn.load("out/best.pt")


@pytest.mark.parametrize("content,message", [
    (bytes(range(256)) * 40, "not UTF-8"), ("Zoë ".encode("utf-16") * 400, "not UTF-8"),
    (b"ab\xed\xa0\x80cd" * 400, "not UTF-8"), (b"abc" * 400 + b"\xc3", "not UTF-8"),
    (b"\0" * 4000, None), (b"\xff\xfe", "not UTF-8"),
    (b"a\0" * 2000, None),  # UTF-16 without a mark: it is text with many zeros
    (("\ufeffab" * 900).encode(), None), (("a" * 10**6 + "b").encode(), None),
    (b"\r\n\r" * 900, None),
    (("\U0010ffff\u0301\u202e" * 900).encode(), None)], ids=lambda x: repr(x)[:24])
def test_strange_texts(folder, content, message):
    (folder / "strange.txt").write_bytes(content)
    arguments = ["--data", "strange.txt", "--steps", 1, *SMALL]
    if message:
        with pytest.raises(ValueError, match=message):
            main(*arguments)
        assert not os.path.exists("out")
    else:
        main(*arguments)
        assert rnn.load("out/best.pt")[1].symbols == sorted(set(content.decode()))


def test_distinct_symbols(folder):
    """Through the script: as many symbols as characters."""
    symbols = [chr(k) for k in range(0x20000, 0x20000 + 1000)]
    (folder / "many.txt").write_bytes("".join(symbols).encode())
    main("--data", "many.txt", "--steps", 1, "--hidden", 2, "--embed", 2, "--batch", 1, "--context",
         8, "--length", 3, "--prompt", symbols[-1])
    model, vocab, _ = rnn.load("out/last.pt")
    assert model.vocab_size == len(vocab) == len(symbols)


@pytest.mark.slow
def test_all_of_unicode(folder):
    """A vocabulary of all that a text can hold. Evaluated on nine predictions, of so many
    probabilities each."""
    text = "".join(chr(k) for k in range(0x110000) if not 0xD800 <= k < 0xE000)
    vocab = rnn.Vocab.of(text)
    ids = vocab.encode(text)
    assert len(vocab) == len(text) == 1_112_064 and vocab.decode(ids) == text
    model = rnn.CharLM(len(vocab), embed=2, hidden=2)
    for _, loss, _ in rnn.train(model, rnn.Batches(ids[:-10], batch=1, context=8), steps=1):
        assert loss == pytest.approx(math.log(len(vocab)), rel=0.2)
    assert rnn.evaluate(model, ids[-10:]) == pytest.approx(math.log(len(vocab)), rel=0.2)
    rnn.save("last.pt", model, vocab)
    model, vocab, _ = rnn.load("last.pt")
    assert model.vocab_size == len(vocab) == len(text)
    assert len(list(rnn.generate(model, vocab, text[-1], length=3))) == 3


# ---- A long run ----


def resident():
    """MiB that this process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_memory_stays_constant(folder, monkeypatch, path):
    """Beyond the first third of a run no more memory, no more tensors. RNN_LONG: so many steps."""
    samples, plain, steps = [], rnn.backward, 0

    def sampling(*arguments, **options):
        nonlocal steps
        if steps % (LONG // 60) == 0:
            big = sum(issubclass(type(t), torch.Tensor) and t.numel() > 2 for t in gc.get_objects())
            samples.append((time.perf_counter(), resident(), big))
        steps += 1
        return plain(*arguments, **options)

    monkeypatch.setattr(rnn, "backward", sampling)
    main("--data", "text.txt", "--steps", LONG, "--embed", 16, "--hidden", 64, "--layers", 2,
         "--batch", 8, "--context", 32, "--dropout", 0.1)
    third = len(samples) // 3
    early, late = samples[third : 2 * third], samples[2 * third :]
    for name, k in (("MiB resident", 1), ("tensors", 2)):
        print(f"{name}: {max(s[k] for s in early):.1f}, then {max(s[k] for s in late):.1f}")
    took = [1000 * (p[-1][0] - p[0][0]) / (len(p) - 1) / (LONG // 60) for p in (early, late)]
    print(f"{steps:,} steps; milliseconds a step: {took[0]:.2f}, then {took[1]:.2f}")
    assert max(s[2] for s in late) <= max(s[2] for s in early)
    assert max(s[1] for s in late) < 1.02 * max(s[1] for s in early)
