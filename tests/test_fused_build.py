"""The fused LSTM built, not built, built for something else; and RNN_KERNEL, which chooses.

The tests marked `slow` compile csrc/ anew, which takes minutes.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from conftest import ROOT, build_fused, python

import rnn


@pytest.fixture(scope="module", autouse=True)
def built():
    build_fused()


USE = "import rnn, torch; rnn.LSTM(2, 3)(torch.zeros(4, 1, 2)); print(rnn.fused is not None)"


@pytest.fixture
def absent(tmp_path):
    """A folder that hides an installed rnn_C: rnn.build() must compile, or take from torch's cache.
    Returns the PYTHONPATH for it."""
    (tmp_path / "rnn_C.py").write_text("raise ModuleNotFoundError('pretends to be absent')")
    return f"{tmp_path}{os.pathsep}{ROOT}"


# ---- RNN_KERNEL ----


def test_every_kernel_by_its_name():
    names = torch.ops.rnn.kernels()
    assert names[0] == "simple"
    for name in (*names, ""):
        torch.ops.rnn.use_kernel(name)
    torch.ops.rnn.use_kernel(rnn.KERNEL)


def test_a_kernel_that_cannot_be_is_an_error_that_lists_the_others():
    can = ", ".join(["plain", *torch.ops.rnn.kernels()])
    message = f"^RNN_KERNEL=fast is not a kernel; possible here: {can}$"
    with pytest.raises(ValueError, match=message):
        torch.ops.rnn.use_kernel("fast")
    for name, needs in (("avx512_bf16", "AVX-512 BF16 in CPU"), ("amx", "AMX in CPU"),
                        ("steps", "a GPU and a build for GPUs"), ("persistent", "a GPU")):
        if name not in torch.ops.rnn.kernels():
            with pytest.raises(ValueError, match=f"^RNN_KERNEL={name} needs {needs}.*: {can}$"):
                torch.ops.rnn.use_kernel(name)
    rnn.LSTM(2, 3)(torch.zeros(4, 1, 2))  # as before


@pytest.mark.slow
def test_the_environment_decides(tmp_path, absent):
    build_and_use = "import rnn; rnn.build();" + USE
    for kernel, fused in (("plain", False), ("simple", True), ("", True)):
        done = python(build_and_use, tmp_path, PYTHONPATH=absent, RNN_KERNEL=kernel)
        assert done.stdout == f"{fused}\n", done.stderr
    not_built = python(USE, tmp_path, PYTHONPATH=absent, RNN_KERNEL="vector")
    assert not_built.returncode
    assert "RNN_KERNEL=vector, but" in not_built.stderr
    unknown = python(build_and_use, tmp_path, PYTHONPATH=absent, RNN_KERNEL="fast")
    assert unknown.returncode
    assert "RNN_KERNEL=fast is not a kernel; possible here: plain, simple" in unknown.stderr


@pytest.mark.slow
def test_the_kernel_that_is_named_runs(tmp_path, absent):
    """`simple` and `vector` sum in different orders, so their last bits differ."""
    if "vector" not in torch.ops.rnn.kernels():
        pytest.skip("built without the fast kernels")
    code = """
        import rnn, torch
        rnn.build()
        torch.manual_seed(0)
        print(rnn.LSTM(50, 60)(torch.randn(20, 9, 50))[0].double().sum().item().hex())
    """
    named = {k: python(code, tmp_path, PYTHONPATH=absent, RNN_KERNEL=k).stdout
             for k in ("simple", "vector", "plain")}
    assert len(set(named.values())) == 3 and all(named.values())


# ---- libraries that do not fit ----


def test_a_library_that_does_not_load_is_one_warning(tmp_path):
    """One of another torch is not even tried."""
    (tmp_path / "rnn_C").mkdir()
    for name in ("__init__.py", "build.py"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "rnn_C")
    for name, content, words in (
            ("native_1_0_0_12345678.py", b"raise SystemExit('must not be loaded')",
             f"for this torch, {torch.__version__}, and this CPU it would be rnn_C.native_"),
            (rnn.fused.build.library() + ".py", b"raise ImportError('undefined symbol')",
             "undefined symbol"),
            (rnn.fused.build.library() + sysconfig.get_config_var("EXT_SUFFIX"), b"\x7fELF damaged",
             "native_")):
        (tmp_path / "rnn_C" / name).write_bytes(content)
        done = python(USE, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", RNN_KERNEL="")
        assert done.returncode == 0 and done.stdout == "False\n"
        assert done.stderr.count("so LSTM runs its plain path") == 1
        assert words in done.stderr


def loaded_library():
    """The file that this process has loaded."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if rnn.fused.build.library() in line)


def test_every_cpu_and_every_torch_has_its_own_library(monkeypatch):
    names = [rnn.fused.build.library()]
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    names.append(rnn.fused.build.library())
    for cpu in ("flags\t\t: fpu avx2 avx512f\n", "flags\t\t: fpu avx2\n", ""):
        monkeypatch.setattr(rnn.fused.build, "open", lambda _, cpu=cpu: io.StringIO(
            f"processor\n{cpu}"), raising=False)
        names.append(rnn.fused.build.library())
    assert len(set(names)) == len(names) and all(re.fullmatch(r"native_\w+", n) for n in names)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the library in /proc")
def test_a_library_that_does_not_fit_does_not_hinder_a_build(tmp_path):
    """It must not even be loaded, for it registers the operators."""
    (tmp_path / "rnn_C").mkdir()
    for name in ("__init__.py", "build.py"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "rnn_C")
    shutil.copy(loaded_library(), tmp_path / "rnn_C" / "native_1_0_0_12345678.so")
    done = python("import rnn; print(rnn.fused); rnn.build();" + USE, tmp_path,
                  PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", RNN_KERNEL="")
    assert done.returncode == 0 and done.stdout == "None\nTrue\n", done.stderr
    assert done.stderr.count("rnn_C does not fit this Python, torch or CPU") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the library in /proc")
def test_two_libraries_in_one_process_are_an_error_and_not_its_end(tmp_path, absent):
    shutil.copy(loaded_library(), tmp_path / "other.so")
    done = python("import torch, rnn; torch.ops.load_library('other.so'); rnn.build()", tmp_path,
                  PYTHONPATH=absent)
    assert done.returncode == 1 and done.stderr.strip().endswith(
        "the operators of another build are loaded already: restart Python")


# ---- compiling just in time ----


def test_reload_keeps_the_operators(tmp_path):
    done = python("import importlib, rnn; rnn.build(); before = rnn.fused; importlib.reload(rnn);"
                  "rnn.build(); assert rnn.fused is before;" + USE, tmp_path)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def test_a_build_that_was_killed_leaves_no_lock_and_the_next_does_not_wait(tmp_path, monkeypatch):
    """torch marks a folder where it builds with a file, and waits for ever if it stays."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built, native = [], rnn.fused.build
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda name: False)

    def load(name, *arguments, build_directory, **options):
        assert name == f"rnn_C_{native.library()}"
        assert not os.path.exists(os.path.join(build_directory, "lock"))
        open(os.path.join(build_directory, "lock"), "w").close()
        built.append(build_directory)

    monkeypatch.setattr(cpp_extension, "load", load)
    for _ in range(2):
        native.compile_and_load()
    assert len(built) == 2 and built[0] == built[1] and built[0].startswith(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif("RNN_BUILDS" not in os.environ, reason="minutes: RNN_BUILDS=1 runs it")
def test_builds_that_are_killed_and_that_run_at_once(tmp_path, absent):
    """From an empty cache: kill a build in its middle, then let two processes build together."""
    settings = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
                "PYTHONPATH": absent}
    command = [sys.executable, "-c", "import rnn; rnn.build(); " + USE]
    first = subprocess.Popen(command, env=settings, cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(20)
    first.kill()
    first.wait()
    assert list((tmp_path / "cache").glob("*/lock"))
    both = [subprocess.Popen(command, env=settings, cwd=tmp_path, stdout=subprocess.PIPE)
            for _ in range(2)]
    assert [process.communicate(timeout=1200)[0] for process in both] == [b"True\n"] * 2


@pytest.mark.parametrize("missing", ["compiler", "c++ in PATH", "ninja", "csrc", "cache"])
def test_build_without_its_tools_says_so(tmp_path, missing, absent):
    """And train_shakespeare.py goes on without: see test_script.py."""
    folder, settings = ROOT, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    if missing == "compiler":
        settings["CXX"] = "/nowhere/c++"
    if missing == "c++ in PATH":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ninja").symlink_to(shutil.which("ninja"))
        settings["PATH"] = str(tmp_path / "bin")
    if missing == "cache":
        settings["TORCH_EXTENSIONS_DIR"] = "/dev/null/cache"
    if missing == "ninja":
        settings["PATH"] = "/nowhere"
    if missing == "csrc":
        folder = tmp_path / "copy"
        folder.mkdir()
        (folder / "rnn.py").write_text((ROOT / "rnn.py").read_text())
    settings["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{folder}"
    done = python("import rnn; rnn.build()", tmp_path, **settings)
    assert done.returncode == 1
    words = "No module named 'csrc'" if missing == "csrc" else "the fused LSTM could not be built: "
    assert words in done.stderr



@pytest.mark.slow
def test_setup_py_installs_what_rnn_py_finds(tmp_path):
    """By pip, from a copy, into a folder of its own."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.py", "rnn.py"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation",
                    "--no-deps", "--target", str(tmp_path / "site"), str(copy)], check=True)
    settings = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "site")}
    for kernel, fused in (("", True), ("simple", True), ("plain", False)):
        done = python(USE, RNN_KERNEL=kernel, **settings)
        assert done.stdout == f"{fused}\n" and "warn" not in done.stderr.lower(), done.stderr
    done = python(USE, RNN_KERNEL="fast", **settings)
    assert done.stderr.splitlines()[-1].startswith("ValueError: RNN_KERNEL=fast is not a kernel")


@pytest.mark.slow
def test_without_csrc_the_plain_path_runs(tmp_path, text):
    """As where rnn.py and the script were copied alone."""
    (tmp_path / "text.txt").write_text(text)
    for name in ("rnn.py", "train_shakespeare.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "train_shakespeare.py", "--data", "text.txt", "--steps",
                           "2", "--batch", "2", "--context", "9", "--hidden", "4"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "RNN_KERNEL": ""})
    assert done.returncode == 0 and "final val_loss=" in done.stdout
    assert "plain path: No module named 'csrc'" in done.stderr
