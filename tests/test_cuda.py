"""What the fused LSTM does on GPUs only: streams, graphs, autocast, its two forms; and when it is
compiled for them. Its results are compared in test_fused.py, by the tests with a `place`.

csrc/README.md, On a GPU, has the commands that look for invalid memory accesses and races.
"""

import os

import pytest
import torch
from conftest import build_fused, need_gpu, use_kernel
from test_fused import random_case, tensors
from torch import nn

import rnn

FORMS = ["steps", "persistent"]


@pytest.fixture(params=FORMS)
def gpu(request):
    need_gpu()
    use_kernel(request.param)
    yield request.param
    torch.ops.rnn.use_kernel(rnn.KERNEL)


def on_gpu(*shape, dtype=torch.float32):
    return [t.detach().to("cuda", dtype) for t in tensors(*shape)]


def run(inputs, sizes, reverse=False):
    """All results of both operators."""
    x, h0, c0, w_ih, bias, w_hh = inputs
    h, c, gates = torch.ops.rnn.lstm_forward(x, w_ih, bias, h0, c0, w_hh, sizes, reverse, True)
    back = torch.ops.rnn.lstm_backward(h, c, gates, c, c0, w_ih, w_hh, sizes, reverse)
    return h, c, gates, *back


# Widths around the 8 and 16 units of a block and the 16 of a tensor core; batches around the 16
# rows of a tile and the 32 or 64 of a group
SHAPES = [(16, 8, 64, [16] * 3), (17, 3, 72, [17, 16, 1]), (64, 5, 256, [64] * 4),
          (70, 4, 40, [70, 33, 32, 31]), (200, 2, 24, [200, 100])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_from_run_to_run(gpu, shape, dtype):
    inputs, sizes = on_gpu(*shape, dtype=dtype), shape[-1]
    first = run(inputs, sizes)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, sizes)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_agree(shape, dtype, reverse):
    """On larger shapes than test_fused.py's, with weights as layers have them."""
    need_gpu()
    inputs, sizes = on_gpu(*shape, dtype=dtype), shape[-1]
    inputs[3:] = [t * shape[2] ** -0.5 for t in inputs[3:]]
    results = []
    for form in FORMS:
        use_kernel(form)
        results.append(run(inputs, sizes, reverse))
    torch.ops.rnn.use_kernel(rnn.KERNEL)
    for a, b in zip(*results):
        bound = 16 * torch.finfo(dtype).eps * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_configurations(gpu, dtype):
    for seed in range(int(os.environ.get("RNN_CASES", 100)) // 4):
        try:
            random_case(seed, "cuda", [dtype])
        except Exception as error:
            raise AssertionError(f'random_case({seed}, "cuda", [{dtype}]) failed') from error


def test_noncontiguous_inputs_and_nothing_to_do(gpu):
    inputs = on_gpu(5, 3, 24, [5, 4])
    turned = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2]
              for t in inputs]
    assert not turned[0].is_contiguous() and not turned[4].is_contiguous()
    for a, b in zip(run(inputs, [5, 4]), run(turned, [5, 4])):
        torch.testing.assert_close(a, b)
    for B, sizes in ((0, [0, 0]), (0, []), (2, [])):
        results = run(on_gpu(B, 3, 5, sizes), sizes)
        assert [tuple(t.shape) for t in results] == [(0, 5), (0, 5), (0, 20), (0, 20), (B, 5),
                                                     (B, 5)]
        assert not any(t.any() for t in results)


def test_in_a_cuda_graph(gpu):
    """Captured once, then replayed on other values in the same memory."""
    sizes = [17, 16, 3]
    inputs = on_gpu(17, 4, 40, sizes)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, sizes)  # torch sets itself up at the first call, which cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, sizes)
    for _ in range(3):
        for t in inputs:
            t.copy_(torch.randn_like(t))
        graph.replay()
        torch.testing.assert_close(captured, run(inputs, sizes))


def test_on_the_callers_stream(gpu):
    """The stream is kept busy, then writes the input; a kernel on another one would come too soon
    and read zeros."""
    sizes = [16] * 3
    inputs = on_gpu(16, 4, 40, sizes)
    expected = run(inputs, sizes)
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        for a, b in zip(late, inputs):
            a.copy_(b)
        results = run(late, sizes)
    stream.synchronize()
    torch.testing.assert_close(results, expected)


def test_on_the_device_of_its_input(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("only one GPU")
    inputs = on_gpu(16, 4, 40, [16] * 3)
    expected = run(inputs, [16] * 3)
    results = run([t.to("cuda:1") for t in inputs], [16] * 3)
    assert all(t.device.index == 1 for t in results)
    torch.testing.assert_close([t.to("cuda:0") for t in results], list(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_the_inputs(gpu, dtype):
    ours = rnn.LSTM(5, 40, 2, bidirectional=True).cuda()
    half = rnn.LSTM(5, 40, 2, bidirectional=True).cuda().to(dtype)
    half.load_state_dict(ours.state_dict())
    x = torch.randn(6, 3, 5, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        output, (h, c) = ours(x)
    assert output.dtype == h.dtype == c.dtype == dtype
    expected = half(x.to(dtype))[0]
    # The two biases are added before they are rounded, or after it
    torch.testing.assert_close(output, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    output.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == p.dtype for p in ours.parameters())
    double = rnn.LSTM(5, 4).cuda().double()
    if gpu == "steps":  # the other form has no float64; as in torch, autocast leaves float64 alone
        with torch.autocast("cuda", dtype):
            assert double(x.double())[0].dtype == torch.float64


def test_the_layer_takes_it(gpu, monkeypatch):
    layer, calls, run = rnn.LSTM(5, 40).cuda(), [], rnn.fused.lstm
    monkeypatch.setattr(rnn.fused, "lstm", lambda *inputs: calls.append(1) or run(*inputs))
    x = torch.randn(6, 3, 5, device="cuda")
    theirs = nn.LSTM(5, 40).double()
    theirs.load_state_dict(layer.state_dict())
    expected = theirs(x.cpu().double())[0].float()
    torch.testing.assert_close(layer(x)[0].cpu(), expected, rtol=0, atol=2e-6)
    assert calls
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_what_does_not_fit_the_persistent_form_is_an_error():
    need_gpu()
    inputs = on_gpu(2, 3, 8, [2], dtype=torch.float64)  # has no persistent form
    use_kernel("persistent")
    with pytest.raises(RuntimeError, match="persistent does not fit this GPU for B=2, H=8"):
        run(inputs, [2])
    use_kernel("steps")
    assert run(inputs, [2])[0].dtype == torch.float64
    wide = [torch.zeros(s, device="cuda") for s in ((1, 1), (1, 8192), (1, 8192), (32768, 1),
                                                    (32768,), (32768, 8192))]
    assert run(wide, [1])[0].shape == (1, 8192)
    torch.ops.rnn.use_kernel(rnn.KERNEL)


# ---- when it is compiled for GPUs: no GPU needed ----


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """A function that pretends: torch's CUDA version, and what the toolkit's nvcc says."""
    from torch.utils import cpp_extension

    build_fused()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def pretend(torch_cuda, says):
        if says is not None:
            (tmp_path / "bin").mkdir()
            nvcc = tmp_path / "bin" / "nvcc"
            nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
            nvcc.chmod(0o755)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        return cpp_extension

    return pretend


RELEASE = "Cuda compilation tools, release {}, V1"


def test_compiled_for_gpus_when_torch_and_the_toolkit_fit(toolkit, monkeypatch):
    toolkit("13.0", RELEASE.format("13.2"))  # another minor version will do
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rnn.fused.build.cuda_sources() == ["lstm_cuda.cu"]
    without_gpu = rnn.fused.build.cuda_flags()
    assert "-gencode=arch=compute_80,code=sm_80" in without_gpu
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ  # that other extensions would see
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert rnn.fused.build.cuda_flags() == ["-O3"]  # torch adds the rest


@pytest.mark.parametrize("torch_cuda,says,message", [
    ("13.0", RELEASE.format("12.9"), "torch was built with CUDA 13.0.*release 12.9.*CPU only"),
    ("12.8", "something else", "toolkit in .* says: something else"),
    ("13.0", None, "No such file"),
])
def test_a_toolkit_that_does_not_fit_is_said_and_left_alone(toolkit, torch_cuda, says, message):
    toolkit(torch_cuda, says)
    with pytest.warns(UserWarning, match=message):
        assert rnn.fused.build.cuda_sources() == []


def test_no_cuda_in_torch_or_no_toolkit_is_no_news(toolkit, monkeypatch, recwarn):
    cpp_extension = toolkit(None, RELEASE.format("13.0"))
    assert rnn.fused.build.cuda_sources() == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert rnn.fused.build.cuda_sources() == [] and not recwarn.list
