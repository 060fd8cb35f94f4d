"""rnn_C: the fused LSTM of csrc/ as Python sees it: compiling, loading, shapes, derivatives.

setup.py installs this folder as the package rnn_C, with the compiled operators inside. rnn.py takes
it from there; or rnn.build() takes it from csrc/ and has it compiled just in time.
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
SOURCES = ["lstm.cpp", "lstm_cpu.cpp", "gradients.cpp", "amx/lstm_amx.cpp",
           "amx/gradients_amx.cpp"]
TYPES = {"cpu": (torch.float32, torch.float64, torch.bfloat16),
         "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
has_cuda = None  # whether the operators run on GPUs too; None: they are not loaded yet

RNN_CPU = os.environ.get("RNN_CPU", "")  # the most that tiles.h may use
if RNN_CPU not in ("", "float32", "avx512_bf16", "amx"):
    raise ValueError(f"RNN_CPU must be float32, avx512_bf16, amx or unset, got '{RNN_CPU}'")


def library():
    """The compiled library's name. It begins with `native`, and every torch and every CPU has its
    own: one for another torch or CPU may crash as soon as it is loaded, so it is not even found."""
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
                      "CUDA_HOME to a toolkit that fits", stacklevel=2)
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
    """Load the operators that setup.py has compiled. Returns this module; or None, after a warning,
    if there are none or they are for another Python, torch or CPU."""
    if has_cuda is None:  # else rnn.py is being reloaded
        name = f"rnn_C.{library()}"
        try:
            if not importlib.machinery.PathFinder.find_spec(name, [FOLDER]):
                raise ImportError(f"for this torch, {torch.__version__}, and this CPU it would be "
                                  f"{name}, which is not in {FOLDER}")
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            warnings.warn("rnn_C does not fit this Python, torch or CPU, so LSTM runs its plain "
                          f"path; build it anew with python setup.py develop ({error})",
                          stacklevel=3)
            return None
        _register_shapes()
    return sys.modules[__name__]


def compile_and_load():
    """Compile just in time; torch keeps the result. Takes a C++ compiler, ninja, half a minute.
    Raises RuntimeError if that fails."""
    import fcntl  # Unix only, as are the flags

    from torch.utils import cpp_extension  # slow to import, so only here

    # To register the operators twice would end the process.
    if torch._C._dispatch_has_kernel("rnn::lstm_forward"):
        raise RuntimeError("the operators of another build are loaded already: restart Python")
    sources = [os.path.join(FOLDER, name) for name in SOURCES + cuda_sources()]
    name = f"rnn_C_{library()}"
    folder = cpp_extension._get_build_directory(name, verbose=False)
    with open(os.path.join(folder, "rnn.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time; ends with it, however it ends
        if os.path.exists(os.path.join(folder, "lock")):  # torch's own does not: a build that was
            os.unlink(os.path.join(folder, "lock"))  # killed would leave all others waiting
        try:
            compile_flags, link_flags = flags()
            cpp_extension.load(name, sources, extra_cflags=compile_flags,
                               extra_cuda_cflags=cuda_flags(), extra_ldflags=link_flags,
                               build_directory=folder)
        except Exception as error:
            raise RuntimeError(f"{error} (in {folder})") from error
    _register_shapes()


def _kind(t):
    return t.dtype, t.device, t.layout


def _check(like, sizes, N, B, **tensors):
    """As the checks of lstm.h: what cannot run must not be traced either. Each of the tensors, by
    name, comes with the shape that it must have."""
    types = TYPES.get(like.device.type, TYPES["cpu"])
    if like.dtype not in types:
        raise RuntimeError(f"lstm: expected one of {types}, got {like.dtype}")
    for name, (t, shape) in tensors.items():
        if t.shape != shape or _kind(t) != (like.dtype, like.device, torch.strided):
            raise RuntimeError(f"lstm: {name} must be {shape}, dense, {like.dtype} on "
                               f"{like.device}, got {tuple(t.shape)}, {_kind(t)}")
    falling = all(0 <= n <= before for before, n in zip([B, *sizes], sizes))
    if not falling or sum(sizes) != N or sizes[:1] != [B][: len(sizes)]:
        raise RuntimeError(f"lstm: sizes must begin with {B}, never grow nor be negative, and add "
                           f"up to {N}, got {sizes}")


def _check_matrices(**tensors):
    for name, t in tensors.items():
        if t.dim() != 2:
            raise RuntimeError(f"lstm: {name} must have 2 dimensions, got {t.dim()}")


def _register_shapes():
    """What the operators return, by shape: so that torch.compile can trace them."""
    global has_cuda
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("rnn::lstm_forward", "CUDA")

    @torch.library.register_fake("rnn::lstm_forward")
    def _(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, save):
        _check_matrices(x=x, h0=h0, w_hh=w_hh)
        (N, I), (B, _), H = x.shape, h0.shape, w_hh.shape[1]
        _check(w_hh, sizes, N, B, x=(x, (N, I)), w_ih=(w_ih, (4 * H, I)), bias=(bias, (4 * H,)),
               h0=(h0, (B, H)), c0=(c0, (B, H)), w_hh=(w_hh, (4 * H, H)))
        return (x.new_empty(N, H), x.new_empty(N if save else B, H),
                x.new_empty(N if save else 0, 4 * H))

    @torch.library.register_fake("rnn::lstm_backward")
    def _(dh, dc, gates, c, c0, w_ih, w_hh, sizes, reverse):
        _check_matrices(gates=gates, c0=c0, w_hh=w_hh)
        w_ih = w_hh[:, :0] if w_ih is None else w_ih
        _check_matrices(w_ih=w_ih)
        (N, _), (B, _), I, H = gates.shape, c0.shape, w_ih.shape[1], w_hh.shape[1]
        _check(w_hh, sizes, N, B, dh=(dh, (N, H)), dc=(dh if dc is None else dc, (N, H)),
               gates=(gates, (N, 4 * H)), c=(c, (N, H)), c0=(c0, (B, H)), w_ih=(w_ih, (4 * H, I)),
               w_hh=(w_hh, (4 * H, H)))
        return (dh.new_empty(N, 4 * H), dh.new_empty(N, I), dh.new_empty(B, H),
                dh.new_empty(B, H))

    @torch.library.register_fake("rnn::lstm_weight_gradients")
    def _(da, x, h, h0, sizes, reverse):
        _check_matrices(x=x, h0=h0)
        (N, I), (B, H) = x.shape, h0.shape
        _check(da, sizes, N, B, da=(da, (N, 4 * H)), x=(x, (N, I)), h=(h, (N, H)), h0=(h0, (B, H)))
        dtype = torch.float32 if da.dtype == torch.bfloat16 else da.dtype
        return tuple(da.new_empty(shape, dtype=dtype) for shape in ((4 * H, I), (4 * H, H), 4 * H))


def type_of(x):
    """x's own, or the one that autocast wants; like torch's own it leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast(inputs):
    """The inputs in the type that autocast wants for the first of them, where it is on."""
    if not torch.is_autocast_enabled(inputs[0].device.type):
        return inputs
    dtype = type_of(inputs[0])
    return [t.to(dtype) for t in inputs]


def can_run(x):
    """Whether the operators serve this input now. Not inside torch.func's transforms (vmap, grad,
    jvp) and forward mode, which they know nothing about."""
    device = x.device.type
    return (type_of(x) in TYPES.get(device, ()) and (device == "cpu" or has_cuda)
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0)


def pays_off(x, sizes):
    """Not for a single step, for which the kernels would first copy the weights into an order of
    their own, which takes longer. Unless it is one of inference: up to 8 rows read the weights
    where they are. Many rows of bfloat16 are worth the copy."""
    rows = sizes[0]
    return (len(sizes) > 1 or x.device.type != "cpu" or rows <= 8 and not torch.is_grad_enabled()
            or rows >= 32 and type_of(x) == torch.bfloat16)


def lstm(x, h0, c0, w_ih, bias, w_hh, sizes, reverse, plain):
    """One direction of one layer: x (N, I), h0 and c0 (B, H), w_ih (4H, I), bias (4H), w_hh (4H, H)
    -> h after every row's step, (N, H), and the state at the end, a tuple of (B, H). `plain`
    computes h and c, (N, H), from the first eight arguments with torch's own operators."""
    inputs = (x, h0, c0, w_ih, bias, w_hh)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        h, c = FusedLSTM.apply(*inputs, sizes, reverse, plain)
        end = rows_at_the_end(c, sizes, reverse)
    else:
        x, h0, c0, w_ih, bias, w_hh = autocast(inputs)
        h, end, _ = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, False)
    return h, (rows_at_the_end(h, sizes, reverse), end)


class FusedLSTM(torch.autograd.Function):
    """Under autocast it computes in a lower precision than its inputs have: the casts are in here,
    where they cost autograd nothing, and the weights' gradients never lose precision."""

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, bias, w_hh, sizes, reverse, plain):
        inputs = (x, h0, c0, w_ih, bias, w_hh)
        x, h0, c0, w_ih, bias, w_hh = autocast(inputs)
        h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, True)
        ctx.save_for_backward(*inputs, x, h0, c0, w_ih, w_hh, h, c, gates)
        ctx.sizes, ctx.reverse, ctx.plain = sizes, reverse, plain
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx, dh, dc):
        *inputs, x, h0, c0, w_ih, w_hh, h, c, gates = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else dh
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # This gradient is to be differentiated once more, which the operators cannot do. So
            # compute all again on the plain path, and let autograd build the gradient's graph.
            inputs = [t.view_as(t) for t in inputs]  # each of its own, should one come twice
            dc = torch.zeros_like(c) if dc is None else dc
            found = iter(torch.autograd.grad(
                ctx.plain(*(t.to(h.dtype) for t in inputs), ctx.sizes, ctx.reverse),
                [t for t in inputs if t.requires_grad], (dh, dc),
                create_graph=True, materialize_grads=True))
            gradients = [next(found) if t.requires_grad else None for t in inputs]
            return *gradients, None, None, None
        needed = ctx.needs_input_grad
        da, dx, dh0, dc0 = torch.ops.rnn.lstm_backward(
            dh, dc, gates, c, c0, w_ih if needed[0] else None, w_hh, ctx.sizes, ctx.reverse)
        dx, dw_ih, dw_hh, dbias = dx if needed[0] else None, None, None, None
        if any(needed[3:6]):  # not if the weights are frozen
            on_cpu = da.device.type == "cpu"
            find = torch.ops.rnn.lstm_weight_gradients if on_cpu else weight_gradients
            dw_ih, dw_hh, dbias = find(da, x, h, h0, ctx.sizes, ctx.reverse)
        gradients = (dx, dh0, dc0, dw_ih, dbias, dw_hh)
        return *(g if g is None else g.to(t.dtype) for g, t in zip(gradients, inputs)), *[None] * 3


def weight_gradients(da, x, h, h0, sizes, reverse):
    """As the operator lstm_weight_gradients: (4H, I), (4H, H) and (4H)."""
    return da.t() @ x, da.t() @ rows_before(h, h0, sizes, reverse), da.sum(0)


def rows_before(h, h0, sizes, reverse):
    """(N, H): the hidden state from which every row's step began, of h (N, H) and h0 (B, H)."""
    B = len(h0)
    if sizes[-1] == B:  # all equally long
        return torch.cat((h[B:], h0) if reverse else (h0, h[: len(h) - B]))
    steps = h.split(sizes)  # T x (B_t, H)
    steps = (*steps[1:], h0[:0]) if reverse else (h0, *steps[:-1])
    return torch.cat([s[:n] if len(s) >= n else torch.cat((s, h0[len(s) : n]))
                      for s, n in zip(steps, sizes)])


def rows_at_the_end(rows, sizes, reverse):
    """(B, H): of rows (N, H), those of each sequence's last step in walking order."""
    if len(sizes) == 1:
        return rows
    if reverse or sizes[-1] == sizes[0]:
        return rows[: sizes[0]] if reverse else rows[len(rows) - sizes[0] :]
    steps = rows.split(sizes)  # T x (B_t, H); sequences n .. B_t end where n go on
    return torch.cat([s[n:] for s, n in zip(steps, [*sizes[1:], 0]) if len(s) > n][::-1])
