"""MoBA: the invariants of its row, against a gate written out token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.moba import MoBA
from crosslight.engines import masks, sparse
from crosslight.errors import CrosslightError


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def qkv(n, batch=2, heads=4, kv_heads=4, dim=8):
    shapes = [(heads, n), (kv_heads, n), (kv_heads, n)]
    return [torch.randn(batch, h, m, dim, dtype=torch.float64).requires_grad_() for h, m in shapes]


def by_hand(q, k, size, top_k):
    """The paper's algorithm for one head: which keys a query reads."""
    q, k, n = q.detach(), k.detach(), len(q)
    visible = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        own = i // size
        scores = [(float(q[i] @ k[b * size : (b + 1) * size].mean(0)), b) for b in range(own)] + [(math.inf, own)]
        for _, b in sorted(scores, reverse=True)[:top_k]:
            visible[i, b * size : min((b + 1) * size, i + 1)] = True
    return visible


@pytest.mark.parametrize(("n", "size", "top_k"), [(64, 8, 3), (61, 8, 2), (30, 7, 1), (5, 8, 2), (50, 1, 4)])
def test_reads_the_blocks_of_the_paper(n, size, top_k):
    q, k, v = qkv(n)
    core = MoBA(4, 8, size, top_k)
    visible = torch.stack([by_hand(a, b, size, top_k) for a, b in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)])
    visible = visible.view(2, 4, n, n)
    assert torch.equal(core.weights(q, k, causal=True) > 0, visible)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    out = core(q, k, v, causal=True)
    assert (out - expected).abs().max() < 1e-10
    goal = torch.randn_like(out)
    got, wanted = (torch.autograd.grad(y, (q, k, v), goal) for y in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("n", [64, 61])
def test_with_all_blocks_it_is_causal_softmax(n):
    q, k, v = qkv(n)
    out = MoBA(4, 8, 8, 8)(q, k, v, causal=True)
    assert (out - F.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max() < 1e-10


@pytest.mark.parametrize("n", [64, 61])
def test_with_all_blocks_and_no_causal_mask_it_is_softmax(n):
    q, k, v = qkv(n)
    assert (MoBA(4, 8, 8, 8)(q, k, v) - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-10


def test_number_of_blocks():
    """min(top_k, blocks so far) when causal, top_k otherwise."""
    q, k, _ = qkv(64)
    core = MoBA(4, 8, 8, 3)
    read = core.weights(q, k, causal=True).unflatten(-1, (8, 8)).sum(-1) > 0
    so_far = torch.arange(64) // 8 + 1
    assert torch.equal(read.sum(-1), so_far.clamp(max=3).expand(2, 4, 64))
    assert read.gather(-1, (so_far - 1).expand(2, 4, 64)[..., None]).all()
    assert ((core.weights(q, k).unflatten(-1, (8, 8)).sum(-1) > 0).sum(-1) == 3).all()


def test_the_future_changes_nothing():
    """Not even the choice of blocks: tokens are replaced, which a gradient would not see."""
    q, k, v = (t.detach() for t in qkv(64))
    core = MoBA(4, 8, 8, 3)
    before = core(q, k, v, causal=True)
    for cut in (9, 31, 40):
        changed = [torch.cat([t[:, :, :cut], 10 * torch.randn_like(t[:, :, cut:])], 2) for t in (q, k, v)]
        assert (core(*changed, causal=True)[:, :, :cut] - before[:, :, :cut]).abs().max() < 1e-12


def test_padding_does_not_move_the_gate():
    """Masked keys are left out of the means, and a block of masked keys is not chosen."""
    q, k, v = (t.detach() for t in qkv(64))
    keep = torch.rand(2, 64) < 0.6
    keep[:, 16:24] = False
    core, mask = MoBA(4, 8, 8, 3), masks.keys(keep)
    noisy = torch.where(keep[:, None, :, None], k, 100 * torch.randn_like(k))
    for causal in (False, True):
        before = core(q, k, v, mask=mask, causal=causal)
        assert (core(q, noisy, v, mask=mask, causal=causal) - before).abs().max() < 1e-12
        assert (core.weights(q, k, mask=mask, causal=causal)[..., 16:24] == 0).all()


def test_the_gate_is_the_same_in_chunks(monkeypatch):
    q, k, _ = qkv(200)
    core = MoBA(4, 8, 8, 5)
    for causal in (False, True):
        whole = core.weights(q, k, causal=causal)
        with monkeypatch.context() as patch:
            patch.setattr("crosslight.attention.moba.CHUNK", 256)
            assert torch.equal(core.weights(q, k, causal=causal) > 0, whole > 0)


def test_grouped_heads_choose_for_themselves():
    q, k, v = qkv(61, kv_heads=2)
    core = MoBA(4, 8, 8, 3)
    full = [t.repeat_interleave(2, 1) for t in (k, v)]
    assert (core(q, k, v, causal=True) - core(q, *full, causal=True)).abs().max() < 1e-12


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_reads_the_chosen_blocks_only(kv_heads):
    attn = crosslight.create("moba", dim=32, heads=4, kv_heads=kv_heads, block_size=4, top_k=2).double()
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    for i in range(37):
        y, cache = attn.step(x[:, i : i + 1], cache)
        assert (y[:, 0] - expected[:, i]).abs().max() < 1e-10
    start, cache = attn.step(x[:, :30])
    rest, _ = attn.step(x[:, 30:], cache)
    assert (torch.cat([start, rest], 1) - expected).abs().max() < 1e-10


def test_cross_attention_forces_no_block():
    """The first query's own place in the context means nothing."""
    q, (_, k, v) = qkv(20)[0], qkv(64)
    core = MoBA(4, 8, 8, 2)
    weights = core.weights(q, k)
    best = (q @ k.unflatten(2, (8, 8)).mean(3).transpose(-1, -2)).topk(2, -1).indices.sort(-1).values
    read = (weights.unflatten(-1, (8, 8)).sum(-1) > 0).nonzero()[:, 3].view(2, 4, 20, 2)
    assert torch.equal(read, best)
    assert (core(q, k, v) - weights @ v).abs().max() < 1e-10


def test_paper_defaults_and_bad_options():
    layer = crosslight.create("moba", dim=32, heads=4)
    assert (layer.core.block_size, layer.core.top_k) == (512, 3)
    assert sum(p.numel() for p in layer.core.parameters()) == 0
    for wrong in ({"block_size": 0}, {"top_k": 0}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("moba", dim=32, heads=4, **wrong)
