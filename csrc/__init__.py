"""The fused LSTM as Python sees it: when it runs, types, derivatives, shapes.

setup.py installs this folder as the package rnn_C, with the compiled operators inside. rnn.py
imports that; or rnn.build() imports csrc and has it compiled just in time (build.py).
"""

import sys

import torch

from . import build

TYPES = {"cpu": (torch.float32, torch.float64, torch.bfloat16),
         "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
has_cuda = None  # whether the operators run on GPUs too; None: they are not loaded yet


# ---- Loading ----


def load(kernel):
    """Load the operators that setup.py has compiled; `kernel` is the value of RNN_KERNEL, "" for
    the best there is. Returns this module; or None if the kernel is "plain", or, after a warning,
    if the operators are for another Python, torch or CPU. ValueError for one that cannot run."""
    if kernel == "plain" or has_cuda is None and not build.load():  # not None: rnn.py is reloaded
        return None
    _use(kernel)
    return sys.modules[__name__]


def compile_and_load(kernel):
    """The same, compiled just in time. Raises RuntimeError if that fails, and ValueError."""
    if has_cuda is None:
        build.compile_and_load()
    _use(kernel)
    return sys.modules[__name__]


def _use(kernel):
    global has_cuda
    if has_cuda is None:
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("rnn::lstm_forward", "CUDA")
        _register_shapes()
    torch.ops.rnn.use_kernel(kernel)


def _register_shapes():
    """What the operators return, by shape, so that torch.compile can trace them. What does not fit
    is found when they run: the checks are in lstm.cpp. Only devices are checked here: with one
    tensor on the meta device, torch calls these functions alone, and the result, on the CPU, would
    be uninitialised memory."""

    def check_devices(*tensors):
        devices = {t.device for t in tensors if t is not None}
        if len(devices) > 1:
            raise RuntimeError(f"lstm: all tensors must be on one device, got {devices}")

    @torch.library.register_fake("rnn::lstm_forward")
    def _(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, save):
        check_devices(x, w_ih, bias, h0, c0, w_hh)
        (N, _), (B, H) = x.shape, h0.shape
        return (x.new_empty(N, H), x.new_empty(N if save else B, H),
                x.new_empty(N if save else 0, 4 * H))

    @torch.library.register_fake("rnn::lstm_backward")
    def _(dh, dc, gates, c, c0, w_ih, w_hh, sizes, reverse):
        check_devices(dh, dc, gates, c, c0, w_ih, w_hh)
        (N, H), (B, _), I = dh.shape, c0.shape, 0 if w_ih is None else w_ih.shape[1]
        return dh.new_empty(N, 4 * H), dh.new_empty(N, I), dh.new_empty(B, H), dh.new_empty(B, H)

    @torch.library.register_fake("rnn::lstm_weight_gradients")
    def _(da, x, h, h0, sizes, reverse):
        check_devices(da, x, h, h0)
        I, H = x.shape[1], h.shape[1]
        dtype = torch.float32 if da.dtype == torch.bfloat16 else da.dtype
        return tuple(da.new_empty(shape, dtype=dtype) for shape in ((4 * H, I), (4 * H, H), 4 * H))


# ---- When it runs, and in which type ----


def type_of(x):
    """x's own, or the one that autocast wants; like torch's own it leaves float64 alone."""
    device = x.device.type
    if device in TYPES and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast(inputs):
    """The inputs in the types that autocast wants, where it is on. Should they differ now, because
    some are float64, the operators raise, as torch's do."""
    if not torch.is_autocast_enabled(inputs[0].device.type):
        return inputs
    return [t.to(type_of(t)) for t in inputs]


def can_run(x, sizes, state, p):
    """Whether the operators serve this input now, as `lstm` takes it. All tensors must be of one
    type and on one device: torch's own errors name what is wrong with others. Not inside
    torch.func's transforms (vmap, grad, jvp) and forward mode, which they know nothing about; nor
    while torch.export, torch.jit.trace or make_fx record what runs: what they record should run
    without this library, and with a batch size that may change."""
    device, dtype = x.device.type, type_of(x)
    return (device in TYPES and (device == "cpu" or has_cuda) and dtype in TYPES[device]
            and all((type_of(t), t.device) == (dtype, x.device) for t in (*state, p.weight_hh))
            and not torch._C._are_functorch_transforms_active()
            and torch.autograd.forward_ad._current_level < 0
            and not recorded() and pays_off(x, sizes))


def recorded():
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    return (not torch.compiler.is_compiling()
            and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None)


def pays_off(x, sizes):
    """Not for a single step, for which the kernels would first copy the weights into an order of
    their own, which takes longer. Unless it is one of inference: up to 8 rows read the weights
    where they are. Many rows of bfloat16 are worth the copy."""
    T, B = x.shape[:2] if sizes is None else (len(sizes), sizes[0])
    return (T > 1 or x.device.type != "cpu" or B <= 8 and not torch.is_grad_enabled()
            or B >= 32 and type_of(x) == torch.bfloat16)


def lstm(x, sizes, state, p, reverse, direction):
    """One direction of one layer: x (T, B, I), or packed (N, I) with the number of rows at each
    step; state h0 and c0 (B, H); p has the parameters. Returns every h, (T, B, H) or (N, H), and
    the final state. `direction` computes the same with torch's own operators."""
    shape, dtype = x.shape[:-1], type_of(x)
    if sizes is None:
        x, sizes = x.flatten(0, 1), [x.shape[1]] * x.shape[0]
    elif sizes[0] != sizes[-1]:
        dtype = state[0].dtype  # as torch.nn.LSTM returns it under autocast, in this case alone

    def plain(x, h0, c0, w_ih, bias, w_hh, sizes, reverse):
        own = type(p)(weight_ih=w_ih, bias_ih=bias, weight_hh=w_hh)
        computed, _ = direction(x, sizes, (h0, c0), own, reverse, keep=True)
        return computed["h"], computed["c"]

    bias = p.weight_hh.new_zeros(len(p.weight_hh)) if p.bias_ih is None else p.bias_ih + p.bias_hh
    inputs = (x, *state, p.weight_ih, bias, p.weight_hh)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        h, c = FusedLSTM.apply(*inputs, sizes, reverse, plain)
        end = rows_at_the_end(c, sizes, reverse)
    else:
        x, h0, c0, w_ih, bias, w_hh = autocast(inputs)
        h, end, _ = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, False)
    h, last = h.to(dtype), rows_at_the_end(h, sizes, reverse)
    return h.view(*shape, h.shape[-1]), (last.to(dtype), end.to(dtype))


# ---- Derivatives ----


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
