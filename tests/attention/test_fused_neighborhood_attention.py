"""Neighbourhood attention: equal to dense attention under the explicit matrix, and the invariants of its row."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight import testing
from crosslight.attention.fused_neighborhood_attention import NeighbourhoodAttention
from crosslight.bench.memory import peak
from crosslight.engines import masks, sparse
from crosslight.errors import CrosslightError


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


class AsToken(NeighbourhoodAttention):
    """Its kind is system; its contract is that of kind token."""

    card = replace(NeighbourhoodAttention.card, kind="token")


@pytest.mark.parametrize("check", [name for name, _ in testing.checks(AsToken.card)])
@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 4, "dilation": 2}], ids=["plain", "dilated"])
def test_conforms_as_token(check, options):
    (outcome,) = testing.check(AsToken, only=check, options=options)
    if outcome.result == "skipped":
        pytest.skip(outcome.why)


def window(side, kernel, dilation, causal):
    """The keys of each cell of an axis, in the words of the paper."""
    visible = torch.zeros(side, side, dtype=torch.bool)
    for cell in range(side):
        group = list(range(cell % dilation, side, dilation))
        place = group.index(cell)
        start = max(0, place - kernel + 1) if causal else max(0, min(place - kernel // 2, len(group) - kernel))
        stop = place + 1 if causal else start + kernel
        visible[cell, group[start:stop]] = True
    return visible


def matrix(grid, kernel, dilation, causal):
    out = torch.ones(1, 1, dtype=torch.bool)
    for axis in zip(grid, kernel, dilation, causal, strict=True):
        out = torch.kron(out.int(), window(*axis).int()).bool()
    return out


def qkv(n, batch=2, heads=3, dim=8):
    return [torch.randn(batch, heads, n, dim, dtype=torch.float64).requires_grad_() for _ in range(3)]


CASES = [
    ((40,), (5,), (1,), (False,)),
    ((200,), (7,), (1,), (False,)),
    ((203,), (9,), (3,), (False,)),
    ((203,), (16,), (2,), (True,)),
    ((12, 17), (3, 5), (1, 1), (False, False)),
    ((25, 19), (7, 3), (2, 3), (False, False)),
    ((25, 19), (3, 3), (1, 1), (True, False)),
    ((16, 16), (5, 5), (1, 3), (True, True)),
    ((5, 9, 11), (3, 3, 5), (1, 1, 1), (False, False, False)),
    ((6, 9, 11), (3, 5, 3), (2, 1, 3), (True, False, True)),
]


@pytest.mark.parametrize(("grid", "kernel", "dilation", "causal"), CASES, ids=str)
def test_equals_dense_attention_under_the_matrix(grid, kernel, dilation, causal):
    visible = matrix(grid, kernel, dilation, causal)
    q, k, v = qkv(len(visible))
    core = NeighbourhoodAttention(3, 8, kernel, dilation, causal)
    out = core(q, k, v, grid=grid)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert (out - expected).abs().max() < 1e-10
    goal = torch.randn_like(out)
    got, wanted = (torch.autograd.grad(y, (q, k, v), goal) for y in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() < 1e-10
    assert torch.equal(core.weights(q, k, grid=grid) > 0, visible.expand(2, 3, -1, -1))


def test_a_window_as_large_as_the_grid_is_full_attention():
    q, k, v = qkv(63)
    full = F.scaled_dot_product_attention(q, k, v)
    assert (NeighbourhoodAttention(3, 8, (7, 9))(q, k, v, grid=(7, 9)) - full).abs().max() < 1e-10
    assert (NeighbourhoodAttention(3, 8, 63)(q, k, v) - full).abs().max() < 1e-10
    assert (NeighbourhoodAttention(3, 8, 99)(q, k, v, grid=(7, 9)) - full).abs().max() < 1e-10


def test_a_window_of_one_returns_v():
    q, k, v = qkv(63)
    assert (NeighbourhoodAttention(3, 8, 1)(q, k, v, grid=(7, 9)) - v).abs().max() < 1e-12


def test_a_corner_reads_a_full_window():
    q, k, _ = qkv(63)
    count = (NeighbourhoodAttention(3, 8, 5).weights(q, k, grid=(7, 9)) > 0).sum(-1)
    assert (count == 25).all()


@pytest.mark.parametrize("grid", [(60,), (6, 10), (3, 4, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_causal_reads_nothing_later(grid, dilation):
    """In the row-major order of the grid, whatever its rank; and every token reads itself."""
    attn = crosslight.create("fused-neighborhood-attention", dim=12, heads=3, kernel_size=3, dilation=dilation).double()
    x = torch.randn(1, 60, 12, dtype=torch.float64)
    seen = attn.weights(x, causal=True, grid=grid)[0, 0] > 0
    assert not seen.triu(1).any()
    assert seen.diagonal().all()
    y = attn(x, causal=True, grid=grid)
    x[:, 41:] = torch.randn(1, 19, 12, dtype=torch.float64)
    assert (attn(x, causal=True, grid=grid)[:, :41] - y[:, :41]).abs().max() < 1e-12


def test_padding_in_a_grid():
    q, k, v = qkv(63)
    keep = torch.rand(2, 63) < 0.5
    keep[0, :30] = False
    core = NeighbourhoodAttention(3, 8, 3)
    visible = matrix((7, 9), (3, 3), (1, 1), (False, False)) & keep[:, None, None]
    out = core(q, k, v, mask=masks.keys(keep), grid=(7, 9))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).masked_fill(~visible.any(-1, keepdim=True), 0)
    assert (out - expected).abs().max() < 1e-10


def test_softmax_with_the_symbolic_mask_is_the_same():
    q, k, v = qkv(63)
    core = NeighbourhoodAttention(3, 8, (3, 5))
    softmax = crosslight.create("softmax", dim=24, heads=3).core
    assert (softmax(q, k, v, mask=core.rule(63, (7, 9))) - core(q, k, v, grid=(7, 9))).abs().max() < 1e-10


def test_compiles_with_a_grid():
    attn = crosslight.create(
        "fused-neighborhood-attention", dim=12, heads=3, kernel_size=(3, 5), dilation=(2, 1)
    ).double()
    x = torch.randn(2, 63, 12, dtype=torch.float64)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for causal in (False, True):
        assert (compiled(x, grid=(7, 9), causal=causal) - attn(x, grid=(7, 9), causal=causal)).abs().max() < 1e-10


def test_memory_has_no_buffer_of_scores(monkeypatch):
    """Forward and backward hold less than the n x k scores of a head would take, and grow as n."""
    monkeypatch.setattr(sparse, "CHUNK", 1 << 16)
    core, used = NeighbourhoodAttention(1, 4, 13), []
    for side in (32, 64):
        q, k, v = (torch.randn(1, 1, side**2, 4).requires_grad_() for _ in range(3))
        used.append(peak(lambda q=q, k=k, v=v, side=side: core(q, k, v, grid=(side, side)).sum().backward()))
    assert used[1] < 4 * 64**2 * 13**2
    assert used[1] < 4.2 * used[0]


def test_decoding_keeps_one_window():
    attn = crosslight.create("fused-neighborhood-attention", dim=12, heads=3, kernel_size=4, dilation=3).double()
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    for i in range(40):
        y, cache = attn.step(x[:, i : i + 1], cache)
        assert (y[:, 0] - expected[:, i]).abs().max() < 1e-10
    assert cache.state[0].shape[2] == 3 * 3


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation", "causal"),
    [
        ((40,), (6,), (3,), (True,)),
        ((12, 17), (3, 5), (2, 1), (False, False)),
        ((13, 11), (4, 3), (1, 2), (False, True)),
        ((5, 8, 9), (3, 4, 3), (1, 2, 3), (True, False, False)),
    ],
    ids=str,
)
def test_parity_with_natten(grid, kernel, dilation, causal):
    natten = pytest.importorskip("natten")
    q, k, v = (torch.randn(1, *grid, 3, 16) for _ in range(3))
    run = getattr(natten, f"na{len(grid)}d")
    expected = run(q, k, v, kernel_size=kernel, dilation=dilation, is_causal=causal, backend="flex-fna")
    flat = [t.flatten(1, len(grid)).transpose(1, 2) for t in (q, k, v)]
    out = NeighbourhoodAttention(3, 16, kernel, dilation, causal)(*flat, grid=grid)
    assert (out.transpose(1, 2).unflatten(1, grid) - expected).abs().max() < 1e-5


def test_bad_options_are_refused():
    q, k, v = (t.detach() for t in qkv(63))
    with pytest.raises(CrosslightError, match="kernel_size"):
        NeighbourhoodAttention(3, 8, (3, 5))(q, k, v)
    with pytest.raises(CrosslightError, match="kernel_size"):
        NeighbourhoodAttention(3, 8, 0)
    with pytest.raises(CrosslightError, match="dilation"):
        NeighbourhoodAttention(3, 8, 3, (1, 0))
    with pytest.raises(CrosslightError, match="grid"):
        NeighbourhoodAttention(3, 8, 3)(q, k, v, grid=(1, 1, 7, 9))


def test_engine_runs_few_scores():
    """The tiles of an 128 x 128 map with 7 x 7 windows hold four times what is visible, dense attention 330 times."""
    rule = NeighbourhoodAttention(1, 16, 7).rule(128**2, (128, 128))
    assert sparse.plan(rule, False, 128**2, 128**2).area < 4.2 * 128**2 * 49
