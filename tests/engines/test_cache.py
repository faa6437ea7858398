"""The decoding cache: what was appended comes back, in order, whatever the capacity."""

import pytest
import torch

from crosslight.engines.cache import KVCache


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 40, [3, 1, 30, 1], [17, 16]])
def test_appended_tokens_come_back_in_order(sizes, grad):
    parts = [(torch.randn(2, 3, n, 4, requires_grad=grad), torch.randn(2, 3, n, 5)) for n in sizes]
    with torch.set_grad_enabled(grad):
        cache = KVCache.start(*parts[0])
        for k, v in parts[1:]:
            cache = cache.append(k, v)
    assert cache.length == sum(sizes)
    assert torch.equal(cache.keys, torch.cat([k for k, _ in parts], 2))
    assert torch.equal(cache.values, torch.cat([v for _, v in parts], 2))


def test_gradients_flow_through_every_step():
    parts = [torch.randn(1, 1, 1, 2, requires_grad=True) for _ in range(5)]
    cache = KVCache.start(parts[0], parts[0])
    seen = []
    for k in parts[1:]:
        cache = cache.append(k, k)
        seen.append(cache.keys.sum())
    for gradient, count in zip(torch.autograd.grad(sum(seen), parts), [4, 4, 3, 2, 1], strict=True):
        assert torch.equal(gradient, torch.full_like(gradient, count))


@torch.no_grad()
def test_copies_are_amortised():
    """Over n steps the storage moves about log2(n) times, not n times."""
    token = torch.zeros(1, 1, 1, 2)
    cache, moves, at = KVCache.start(token, token), 0, None
    for _ in range(500):
        cache = cache.append(token, token)
        moves, at = moves + (cache.k.data_ptr() != at), cache.k.data_ptr()
    assert moves <= 8


def test_bytes_count_the_tokens_and_not_the_capacity():
    with torch.no_grad():
        cache = KVCache.start(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 5))
        for _ in range(6):
            cache = cache.append(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 5))
    assert cache.k.shape[2] > 7
    assert cache.nbytes == 4 * 2 * 3 * 7 * (4 + 5)
