"""What is counted instead of timed: FLOPs and bytes."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from crosslight.bench import flops, memory


@pytest.mark.parametrize("grad", [False, True])
def test_flash_attention_on_the_cpu_counts(grad):
    q = torch.randn(2, 3, 64, 16, requires_grad=grad)
    k = torch.randn(2, 3, 48, 16)
    product = 2 * 2 * 3 * 64 * 48 * 16
    assert flops.count(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * product


def test_backward_counts():
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    product = 2 * 2 * 64 * 64 * 16
    # Two products forward; backward the scores again and four products.
    assert flops.count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == (2 + 5) * product
    w = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(8, 16)
    assert flops.count(lambda: torch.autograd.grad((x @ w).sum(), w)) == 2 * 2 * 8 * 16 * 16


def test_fourier_transforms_count():
    x = torch.randn(4, 256)
    assert flops.count(lambda: torch.fft.rfft(x, n=512)) == 2.5 * 4 * 512 * 9
    assert flops.count(lambda: torch.fft.fft(x.to(torch.complex64))) == 5 * 4 * 256 * 8


@pytest.mark.parametrize("peak", [memory.peak, memory.peak_of_tensors])
def test_peak_is_what_is_held_at_once(peak):
    x = torch.randn(1 << 18)
    size = x.numel() * 4
    assert peak(lambda: x + x) == size
    assert peak(lambda: (x + x) + x) == 2 * size
    assert peak(lambda: [(x + x).sum() for _ in range(3)]) < 1.01 * size, "what is freed counts no more"
    assert peak(lambda: x.view(2, -1).t()) == 0


@pytest.mark.parametrize("peak", [memory.peak, memory.peak_of_tensors])
def test_peak_sees_what_autograd_saves(peak):
    x = torch.randn(1 << 18, requires_grad=True)
    assert peak(lambda: x.exp().exp().exp()) == 3 * x.numel() * 4
    assert peak(lambda: x.exp().exp().sum().backward()) >= 3 * x.numel() * 4
    with torch.no_grad():
        assert peak(lambda: x.exp().exp().exp()) == 2 * x.numel() * 4


def test_matrix_form_takes_a_matrix_and_flash_does_not():
    q = torch.randn(1, 2, 512, 16)
    matrix = 2 * 512 * 512 * 4
    assert memory.peak(lambda: (q @ q.mT).softmax(-1) @ q) >= 2 * matrix
    assert memory.peak(lambda: F.scaled_dot_product_attention(q, q, q)) < matrix


def test_too_much_memory_is_an_error_that_is_known():
    with memory.bounded(), pytest.raises((RuntimeError, MemoryError)) as found:
        torch.empty(1 << 50)
    assert memory.is_out_of_memory(found.value)
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert torch.ones(8).sum() == 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and glibc are of Linux")
def test_kept_memory_does_not_widen_the_bound():
    """What was freed and kept counts as free already; counted as used too, a call could have it twice."""
    program = """
import resource, torch
from crosslight.bench import memory

def room():
    with memory.bounded(), open("/proc/self/statm") as file:
        return resource.getrlimit(resource.RLIMIT_AS)[0] - int(file.read().split()[0]) * resource.getpagesize()

memory.keep_freed()
blocks = [torch.empty(1 << 27) for _ in range(8)]  # 4 GiB of addresses, untouched
last, before = torch.empty(1 << 20), room()  # behind them, so that they cannot be given back
del blocks
print(before - room() >> 20)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 3500, found.stderr
