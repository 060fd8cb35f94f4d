"""Compiles the operators of csrc/ and loads them: for setup.py once, for rnn.build() just in time.

A library is made for one machine: with the vector instructions of its CPU, against its torch. Its
name says both, so one for another torch or CPU, which may crash as soon as it is loaded, is not
even found.
"""

import hashlib
import importlib.machinery
import os
import platform
import re
import subprocess
import sys
import warnings

import torch

FOLDER = os.path.dirname(os.path.abspath(__file__))
AMX = ["amx/lstm_amx.cpp", "amx/gradients_amx.cpp"]
SOURCES = ["lstm.cpp", "lstm_simple.cpp", "lstm_cpu.cpp", "gradients.cpp", *AMX]


def library():
    """The compiled library's name: `native`, the version of torch, a number for the CPU."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:  # what the first core can do, as on x86 or on Arm
            cpu = next((line for line in file if re.match("flags|Features", line)), cpu)
    made_for = re.sub(r"\W", "_", torch.__version__)
    return f"native_{made_for}_{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"


def flags():
    """The compiler's and the linker's: for the machine at hand, with its own vector instructions;
    OpenMP where compilers bring it."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return ["-O3", native, *openmp], openmp


def cuda_sources():
    """What to compile for GPUs: nothing unless torch was built with CUDA and a toolkit of the same
    major version is found. It does not matter whether this machine has a GPU."""
    if torch.version.cuda is None:
        return []
    from torch.utils import cpp_extension  # slow to import, so only here

    home = cpp_extension.CUDA_HOME
    if home is None:
        return []
    try:
        said = subprocess.check_output([os.path.join(home, "bin", "nvcc"), "--version"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(error)
    found = re.search(r"release (\d+)\.\d+", said)
    if not found or found[1] != torch.version.cuda.split(".")[0]:
        warnings.warn(f"torch was built with CUDA {torch.version.cuda}, but the toolkit in {home} "
                      f"says: {said.strip()}. The fused LSTM is compiled for the CPU only; set "
                      "CUDA_HOME to a toolkit of the same major version", stacklevel=2)
        return []
    return ["lstm_cuda.cu"]


def cuda_flags():
    """For the GPU at hand or those of TORCH_CUDA_ARCH_LIST, which torch adds; with neither for
    8.0, 9.0 and what comes after."""
    if torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ:
        return ["-O3"]
    return ["-O3", "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def load():
    """Load the library that setup.py has compiled. Returns whether that succeeded; if there is
    none, or it is for another Python, torch or CPU, a warning says so."""
    name = f"rnn_C.{library()}"
    try:
        if not importlib.machinery.PathFinder.find_spec(name, [FOLDER]):
            raise ImportError(f"for this torch, {torch.__version__}, and this CPU it would be "
                              f"{name}, which is not in {FOLDER}")
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn("rnn_C does not fit this Python, torch or CPU, so LSTM runs its plain path; "
                      f"build it anew with python setup.py develop ({error})", stacklevel=4)
        return False
    return True


def compile_and_load():
    """Compile just in time; torch keeps the result. Takes a C++ compiler, ninja, half a minute.
    Raises RuntimeError if that fails."""
    import fcntl  # Unix only, as are the flags

    from torch.utils import cpp_extension  # slow to import, so only here

    # To register the operators twice would end the process.
    if torch._C._dispatch_has_kernel("rnn::lstm_forward"):
        raise RuntimeError("the operators of another build are loaded already: restart Python")
    sources = [os.path.join(FOLDER, name) for name in SOURCES + cuda_sources()]
    name, (compile_flags, link_flags) = f"rnn_C_{library()}", flags()
    try:
        folder = cpp_extension._get_build_directory(name, verbose=False)
        with open(os.path.join(folder, "rnn.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time; ends with it, however it ends
            if os.path.exists(os.path.join(folder, "lock")):  # torch's own does not: a build that
                os.unlink(os.path.join(folder, "lock"))  # was killed would leave all others waiting
            cpp_extension.load(name, sources, extra_cflags=compile_flags,
                               extra_cuda_cflags=cuda_flags(), extra_ldflags=link_flags,
                               build_directory=folder)
    except Exception as error:  # no compiler, no ninja, a folder that cannot be written
        raise RuntimeError(f"the fused LSTM could not be built: {error}") from error
