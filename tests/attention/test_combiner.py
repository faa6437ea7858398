"""Combiner: the factors written out token by token, and the invariants of its row."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.combiner import Combiner, Elsewhere
from crosslight.engines import masks, sparse
from crosslight.errors import CrosslightError

INSTANCES = ("fixed", "logsparse", "axial")


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def qkv(n, batch=2, heads=2, dim=8):
    return [torch.randn(batch, heads, n, dim, dtype=torch.float64).requires_grad_() for _ in range(3)]


def by_hand(q, k, keep, instance, size, causal):
    """p(j|i) of one head."""
    n = len(q)
    p = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        terms = []  # of p~: a logit, and the distribution over tokens that it stands for
        one = torch.eye(n, dtype=q.dtype)
        if instance == "logsparse":
            direct, blocks, level = [i], [], 0
            while 1 << level < n:
                sibling = (i >> level) ^ 1
                if not causal or sibling < i >> level:
                    blocks.append([j for j in range(n) if j >> level == sibling])
                level += 1
        else:
            direct = [j for j in range(n) if j // size == i // size and (j <= i or not causal)]
            others = range(i // size) if causal else [r for r in range((n - 1) // size + 1) if r != i // size]
            blocks = [[j for j in range(n) if j // size == r] for r in others]
        terms += [(q[i] @ k[j], one[j]) for j in direct if keep[j]]
        for block in blocks:
            column = [j for j in block if j % size == i % size and keep[j]]
            block = [j for j in block if keep[j]]
            if not block:
                continue
            if instance == "axial":
                asks, key = (q[column[0]], k[column[0]]) if column else (0 * q[0], 0 * k[0])
            else:
                asks, key = q[block].max(0).values, k[block].max(0).values
            inside = (k[block] @ asks / q.shape[1] ** 0.5).softmax(0)
            terms.append((q[i] @ key, inside @ one[block]))
        if terms:
            share = (torch.stack([a for a, _ in terms]) / q.shape[1] ** 0.5).softmax(0)
            p[i] = share @ torch.stack([b for _, b in terms])
    return p


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "masked"), [(16, False), (21, False), (21, True)])
def test_equals_the_factors_written_out(instance, causal, n, masked):
    q, k, v = qkv(n)
    core = Combiner(2, 8, instance, 4)
    keep = torch.rand(2, n) < 0.6 if masked else torch.ones(2, n, dtype=torch.bool)
    mask = masks.keys(keep) if masked else None
    p = torch.stack(
        [torch.stack([by_hand(q[b, h], k[b, h], keep[b], instance, 4, causal) for h in range(2)]) for b in range(2)]
    )
    torch.testing.assert_close(core.weights(q, k, mask=mask, causal=causal), p)
    y = core(q, k, v, mask=mask, causal=causal)
    torch.testing.assert_close(y, p @ v)
    goal = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(t, (q, k, v), goal) for t in (y, p @ v))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("n", [1, 13, 32])
def test_attention_is_full(instance, pool, n):
    """Rows sum to 1, and every token that may be read has a positive weight."""
    q, k, _ = qkv(n)
    core = Combiner(2, 8, instance, 4, pool)
    for causal in (True, False):
        p = core.weights(q, k, causal=causal)
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 2, n, dtype=torch.float64))
        assert torch.equal(p > 0, torch.ones(n, n, dtype=torch.bool).tril(0 if causal else n).expand(2, 2, n, n))


@pytest.mark.parametrize("causal", [True, False])
def test_one_block_and_blocks_of_one_token_are_exact_softmax(causal):
    q, k, v = qkv(20)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    for instance, size in (("fixed", 32), ("axial", 32), ("fixed", 1), ("axial", 1)):
        torch.testing.assert_close(Combiner(2, 8, instance, size)(q, k, v, causal=causal), expected)


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("n", [5, 27])
def test_decoding(instance, n):
    attn = crosslight.create("combiner", dim=16, heads=2, instance=instance, block_size=4).double()
    x = torch.randn(2, n, 16, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    for i in range(n):
        y, cache = attn.step(x[:, i : i + 1], cache)
        torch.testing.assert_close(y[:, 0], expected[:, i])
    if instance == "fixed":  # the tokens of the last block, and a summary of each block before
        assert (cache.state.k.shape[2], cache.state.summary_k.shape[2]) == (n % 4, n // 4)


@pytest.mark.parametrize("past", [True, False])
def test_the_mask_of_summaries_plans_what_it_shows(past):
    rule = Elsewhere(3, past)
    shown = rule.dense(1, 1, 20, 7)[0, 0]
    for i0 in range(0, 20, 4):
        for j0 in range(0, 7, 2):
            tile = shown[i0 : i0 + 4, j0 : j0 + 2]
            ends = [torch.tensor(t) for t in (i0, min(i0 + 3, 19), j0, min(j0 + 1, 6))]
            some, every = rule.blocks(tuple(ends))
            assert some or not tile.any()
            assert tile.all() or not every


@pytest.mark.parametrize("instance", INSTANCES)
def test_work_is_below_quadratic(instance):
    from crosslight.testing import flops

    def work(n):
        core = Combiner(1, 16, instance, round(n**0.5))
        return flops.measure(lambda: core(*(torch.randn(1, 1, n, 16) for _ in range(3)), causal=True))

    small, large = work(1024), work(4096)
    assert flops.growth(small.flops, large.flops, 4) < (1.3 if instance == "logsparse" else 1.65)
    assert large.largest < 4096**2 / 16


def test_bad_options_are_refused():
    for wrong in ({"instance": "sqrt"}, {"block_size": 0}, {"pool": "sum"}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("combiner", dim=16, heads=2, **wrong)
