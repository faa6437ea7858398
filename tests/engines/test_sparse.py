"""The sparse engine against dense attention under the same mask: values, gradients, plans, memory."""

import math
import shutil

import pytest
import torch

from crosslight.bench.memory import peak
from crosslight.engines import dense, flex, masks, plans, routed, sparse
from crosslight.engines.backend import backend
from crosslight.engines.masks import Neighbourhood
from crosslight.errors import CrosslightError

N, M = 203, 203


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def half(n: int) -> torch.Tensor:
    """Key padding of two entries: about half of the first, all of the second."""
    keep = torch.rand(2, n) < 0.5
    keep[1] = False
    return keep


RULES = {
    "everything": lambda: None,
    "causal": masks.causal,
    "window": lambda: masks.window(10),
    "causal window": lambda: masks.causal() & masks.window(17),
    "radius 0": lambda: masks.window(0),
    "dilated window": lambda: masks.window(30) & masks.dilated(3),
    "sink and window": lambda: masks.causal() & (masks.window(17) | masks.sink(3)),
    "same block": lambda: masks.same_block(40) & masks.causal(),
    "padded": lambda: masks.window(17) & masks.keys(half(M)),
    "padded or sink": lambda: masks.keys(half(M)) | masks.sink(1),
    "far only": lambda: ~masks.window(100),
    "documents": lambda: masks.segments(torch.arange(N)[None].expand(2, N) // torch.tensor([[30], [51]])),
    "scattered segments": lambda: masks.segments(torch.randint(0, 3, (2, N))) & masks.window(40),
    "pairs": lambda: masks.as_mask(torch.rand(2, 4, N, M) < 0.1, batch=2, heads=4, n=N, m=M),
    "pairs in a window": lambda: masks.window(9) & masks.as_mask(torch.rand(2, N, M) < 0.5, batch=2, heads=4, n=N, m=M),
    "nothing": lambda: masks.sink(0),
    "1-D": lambda: Neighbourhood((N,), (9,), (1,), (False,)),
    "1-D dilated": lambda: Neighbourhood((N,), (9,), (4,), (False,)),
    "1-D too wide": lambda: Neighbourhood((N,), (500,), (1,), (False,)),
    "2-D": lambda: Neighbourhood((29, 7), (5, 3), (1, 1), (False, True)),
    "2-D dilated, causal": lambda: Neighbourhood((29, 7), (5, 3), (3, 2), (False, False)) & masks.causal(),
    "3-D, padded": lambda: Neighbourhood((1, 7, 29), (3, 3, 5), (1, 2, 1), (True, False, False)) & masks.keys(half(M)),
}


def qkv(batch=2, heads=4, kv_heads=2, n=N, m=M, dim=8, value_dim=5, dtype=torch.float64):
    return (
        torch.randn(batch, heads, n, dim, dtype=dtype).requires_grad_(),
        torch.randn(batch, kv_heads, m, dim, dtype=dtype).requires_grad_(),
        torch.randn(batch, kv_heads, m, value_dim, dtype=dtype).requires_grad_(),
    )


def results(call, inputs):
    """Output, log-sum-exp, and the gradients of a random function of both."""
    torch.manual_seed(1)
    out, lse = call()
    empty = lse == -math.inf
    lse = lse.masked_fill(empty, 0.0)
    goal = (out * torch.randn_like(out)).sum() + (lse * torch.randn_like(lse)).sum()
    return [out, lse, empty.to(out.dtype), *torch.autograd.grad(goal, inputs)]


def agree(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance


# The planned executor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk", [1 << 10, 1 << 19], ids=["many chunks", "one chunk"])
def test_equals_dense(rule, chunk, monkeypatch):
    mask, inputs = RULES[rule](), qkv()
    with backend("reference"):
        expected = results(lambda: sparse.attend_with_lse(*inputs, mask=mask), inputs)
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    agree(results(lambda: sparse.attend_with_lse(*inputs, mask=mask), inputs), expected)
    assert torch.equal(sparse.attend(*inputs, mask=mask), sparse.attend_with_lse(*inputs, mask=mask)[0])


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 129])
@pytest.mark.parametrize("m", [1, 32, 100])
def test_any_length(n, m):
    inputs, mask = qkv(n=n, m=m), masks.window(7) | masks.sink(2)
    with backend("reference"):
        expected = results(lambda: sparse.attend_with_lse(*inputs, mask=mask, causal=True, scale=0.3), inputs)
    agree(results(lambda: sparse.attend_with_lse(*inputs, mask=mask, causal=True, scale=0.3), inputs), expected)


def test_strided_inputs():
    """Heads come as views of (batch, n, heads * dim)."""
    q, k, v = (torch.randn(2, N, 32, dtype=torch.float64).requires_grad_() for _ in range(3))
    q4, k4, v4 = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, v))
    mask = masks.window(12)
    with backend("reference"):
        expected = results(lambda: sparse.attend_with_lse(q4, k4, v4, mask=mask), (q, k, v))
    agree(results(lambda: sparse.attend_with_lse(q4, k4, v4, mask=mask), (q, k, v)), expected)


def test_gradcheck():
    inputs = qkv(batch=1, heads=2, kv_heads=1, n=40, m=40, dim=3, value_dim=2)
    assert torch.autograd.gradcheck(
        lambda *t: sparse.attend(*t, mask=masks.window(3) | masks.sink(1)), inputs, fast_mode=True
    )


def test_rows_without_keys_are_zero():
    q, k, v = qkv()
    out, lse = sparse.attend_with_lse(q, k, v, mask=masks.keys(half(M)) & masks.window(3))
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() and (t.grad[1] == 0).all() for t in (q, k, v))


def test_hidden_values_do_not_matter():
    """Not even enormous ones."""
    q, k, v = (t.detach() for t in qkv())
    mask = masks.window(5)
    before = sparse.attend(q, k, v, mask=mask)
    k[:, :, 150:], v[:, :, 150:] = 1e30, 1e30
    assert torch.equal(sparse.attend(q, k, v, mask=mask)[:, :, :140], before[:, :, :140])


def test_large_scores_stay_finite():
    q, k, v = (t.detach() for t in qkv())
    out, lse = sparse.attend_with_lse(300 * q, 300 * k, v, mask=masks.window(5))
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_a_mask_may_change_after_the_call():
    inputs, keep = qkv(), half(M)
    before = keep.clone()
    out = sparse.attend(*inputs, mask=masks.window(9) & masks.keys(keep))
    keep.logical_not_()
    got = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(sparse.attend(*inputs, mask=masks.window(9) & masks.keys(before)).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = [t.detach().to(dtype) for t in qkv()]
    mask = masks.window(20)
    out = sparse.attend(*inputs, mask=mask)
    assert out.dtype == dtype
    wide = sparse.attend(*[t.double() for t in inputs], mask=mask)
    assert (out.double() - wide).abs().max() < 2e-2


def test_autocast_does_not_lower_the_sums():
    inputs = [t.detach().float() for t in qkv()]
    expected = sparse.attend(*inputs, mask=masks.window(20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse.attend(*inputs, mask=masks.window(20)), expected)


def test_compiles_as_one_graph():
    q, k, v = qkv(n=50, m=50)
    keep = torch.rand(2, 50) < 0.6

    def run(q, k, v, keep):
        near = masks.causal() & masks.window(5) & masks.keys(keep)
        parts = [
            sparse.attend_with_lse(q, k, v, mask=near),
            sparse.attend_with_lse(q, k, v, mask=masks.Not(masks.window(5)) & masks.keys(keep)),
        ]
        return sparse.merge(parts)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = results(lambda: run(q, k, v, keep), (q, k, v))
    agree(results(lambda: compiled(q, k, v, keep), (q, k, v)), expected)
    other = ~keep  # not baked into the graph
    agree(results(lambda: compiled(q, k, v, other), (q, k, v)), results(lambda: run(q, k, v, other), (q, k, v)))


def test_merge_joins_disjoint_keys():
    inputs = qkv()
    keep, near, odd = masks.keys(half(M)), masks.window(20), masks.dilated(2)
    thirds = [near & odd & keep, near & ~odd & keep, ~near & keep]
    whole = results(lambda: sparse.attend_with_lse(*inputs, mask=keep), inputs)
    agree(results(lambda: sparse.merge([sparse.attend_with_lse(*inputs, mask=t) for t in thirds]), inputs), whole)


@pytest.mark.parametrize("forced", ["chunked"])
def test_unknown_backend_is_refused(forced):
    with backend(forced), pytest.raises(CrosslightError, match="backend"):
        sparse.attend(*qkv(), mask=masks.window(3))


# Plans --------------------------------------------------------------------------------------------------------------


def covered(plan: plans.Plan, n: int, m: int) -> torch.Tensor:
    """How many tiles compute each pair."""
    count = torch.zeros(n, m, dtype=torch.int)
    for part in plan.parts:
        i = part.queries.positions(0, part.count, torch.device("cpu"))
        j = part.keys.positions(0, part.count, torch.device("cpu"))
        for rows, columns in zip(i.long(), j.long(), strict=True):
            count[rows[rows >= 0][:, None], columns[(columns >= 0) & (columns < m)]] += 1
    return count


@pytest.mark.parametrize("rule", RULES)
def test_plans_hold_every_visible_pair_once(rule):
    mask = RULES[rule]()
    count = covered(plans.plan(mask, False, N, M), N, M)
    visible = torch.ones(1, 1, N, M, dtype=torch.bool) if mask is None else mask.dense(2, 4, N, M)
    assert (count[visible.flatten(0, 1).any(0)] == 1).all()
    assert count.max() <= 1


def test_bands_are_read_in_place():
    plan = plans.plan(masks.causal() & masks.window(255), False, 8192, 8192, 128)
    band = plan.parts[0]
    assert isinstance(band.queries, plans.Stride)
    assert isinstance(band.keys, plans.Stride)
    assert (band.count, band.keys.rows, band.step) == (62, 384, 128)
    assert plan.area < 1.01 * 8192 * 384


def test_whole_tiles_are_known():
    plan = plans.plan(masks.same_block(64), False, 512, 512, 64)
    assert [part.whole for part in plan.parts] == [True]
    assert plan.area == 512 * 64


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (masks.causal() & masks.window(127), 1.6),
        (masks.causal() & (masks.window(255) | masks.sink(4)), 2.3),
        (Neighbourhood((64, 128), (7, 7), (1, 1), (False, False)), 4.1),
        (Neighbourhood((8, 32, 32), (3, 7, 7), (1, 1, 1), (True, False, False)), 6.0),
        (Neighbourhood((8192,), (64,), (16,), (False,)), 2.1),
        (Neighbourhood((64, 128), (7, 7), (2, 4), (False, False)), 4.1),
    ],
    ids=str,
)
def test_work_follows_what_is_visible(mask, share):
    """Pairs that are computed, for each that is visible. A box of queries reads the box around all their windows."""
    n = 8192
    visible = sum(
        mask.visible(0, 0, torch.arange(n)[:, None], torch.arange(at, at + 64)).sum() for at in range(0, n, 64)
    )
    assert plans.plan(mask, False, n, n).area <= share * visible.item()


def test_area_grows_with_the_length_only():
    for mask in (masks.window(128), masks.causal() & (masks.window(100) | masks.sink(4))):
        small, large = (plans.plan(mask, False, n, n).area for n in (4096, 16384))
        assert large <= 4.2 * small


def test_plans_are_kept_unless_they_hold_tensors():
    mask = masks.window(77)
    assert plans.plan(mask, True, 500, 500) is plans.plan(masks.window(77), True, 500, 500)
    keep = torch.ones(1, 500, dtype=torch.bool)
    assert plans.plan(mask & masks.keys(keep), True, 500, 500) is plans.plan(mask, True, 500, 500)
    cut = masks.segments(torch.arange(500)[None] // 100)
    assert plans.plan(cut, True, 500, 500) is not plans.plan(cut, True, 500, 500)


def test_pays_where_most_is_hidden():
    assert sparse.pays(masks.window(128), False, 8192, 8192)
    assert sparse.pays(masks.causal() & masks.window(128), False, 2048, 2048)
    assert sparse.pays(masks.segments(torch.arange(4096)[None] // 256), False, 4096, 4096)
    assert not sparse.pays(None, True, 8192, 8192)
    assert not sparse.pays(masks.window(8), False, 512, 512)
    assert not sparse.pays(masks.window(4000), False, 8192, 8192)
    assert not sparse.pays(masks.keys(torch.ones(1, 4096, dtype=torch.bool)), False, 4096, 4096)
    with backend("gather"):
        assert sparse.pays(masks.window(8), False, 16, 16)
    with backend("sdpa"):
        assert not sparse.pays(masks.window(128), False, 8192, 8192)


def test_short_calls_are_dense(monkeypatch):
    monkeypatch.setattr(sparse, "TINY", 1 << 14)
    monkeypatch.setattr(sparse, "_Planned", None)
    monkeypatch.setattr(routed, "_Routed", None)
    inputs, mask = qkv(n=100, m=100), masks.window(5)
    chosen = choice(100, 7, 2)
    got = sparse.attend(*inputs, mask=mask), *sparse.attend_with_lse(*inputs, mask=mask)
    more = routed.attend(*inputs, chosen, 16)
    monkeypatch.undo()
    with backend("gather"):
        agree(got, [sparse.attend(*inputs, mask=mask), *sparse.attend_with_lse(*inputs, mask=mask)])
        wanted = routed.attend(*inputs, chosen, 16)
        agree([more[0], more[1].exp()], [wanted[0], wanted[1].exp()])


# Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & masks.window(255),
        masks.causal() & (masks.window(127) | masks.sink(4)),
        Neighbourhood((256, 256), (7, 7), (1, 1), (False, False)),
    ],
    ids=["window", "sink and window", "2-D"],
)
def test_extra_memory_at_64k_tokens(mask):
    """At most 8 times the bytes of q, k, v and the output, the gradients among them."""
    inputs = [torch.randn(1, 1, 1 << 16, 16).requires_grad_() for _ in range(3)]

    def call():
        sparse.attend(*inputs, mask=mask).sum().backward()

    assert peak(call) <= 8 * 4 * inputs[0].nbytes


def test_routed_memory_at_64k_tokens():
    n, size = 1 << 16, 256
    inputs = [torch.randn(1, 1, n, 16).requires_grad_() for _ in range(3)]
    chosen = torch.rand(1, 1, n, n // size).topk(2, -1).indices

    def call():
        routed.attend(*inputs, chosen, size)[0].sum().backward()

    assert peak(call) <= 8 * 4 * inputs[0].nbytes


# The routed executor ------------------------------------------------------------------------------------------------


def choice(n: int, blocks: int, count: int, none: float = 0.2) -> torch.Tensor:
    chosen = torch.rand(2, 4, n, blocks).topk(min(count, blocks), -1).indices
    return chosen.masked_fill(torch.rand(chosen.shape) < none, -1)


@pytest.mark.parametrize(
    ("size", "count", "none", "mask"),
    [
        (16, 3, 0.2, None),
        (7, 2, 0.0, None),
        (16, 2, 1.1, None),
        (500, 1, 0.2, None),
        (1, 30, 0.2, None),
        (16, 4, 0.2, masks.window(60)),
        (16, 4, 0.2, masks.keys(torch.rand(2, M) < 0.3)),
        (16, 4, 0.2, masks.as_mask(torch.rand(2, 4, N, M) < 0.3, batch=2, heads=4, n=N, m=M)),
    ],
)
@pytest.mark.parametrize("small", [False, True], ids=["at once", "in turns"])
def test_routed_equals_dense(size, count, none, mask, small, monkeypatch):
    inputs, chosen = qkv(), choice(N, math.ceil(M / size), count, none)

    def run():
        return routed.attend(*inputs, chosen, size, mask=mask)

    with backend("reference"):
        expected = results(run, inputs)
    if small:
        monkeypatch.setattr(sparse, "CHUNK", 1 << 10)
        monkeypatch.setattr(routed, "BUFFER", 1 << 10)
    agree(results(run, inputs), expected)


def test_routed_with_keys_that_are_always_read():
    inputs, size = qkv(), 16
    chosen = choice(N, math.ceil(M / size), 4)
    own = torch.arange(N)[:, None] // size
    chosen = chosen.masked_fill(chosen == own, -1)
    keep = masks.keys(torch.rand(2, M) < 0.5)
    always = masks.causal() & masks.same_block(size) & keep

    def run():
        return routed.attend(*inputs, chosen, size, mask=keep, always=always)

    def parts():
        there = sparse.attend_with_lse(*inputs, mask=always)
        return sparse.merge([there, routed.attend(*inputs, chosen, size, mask=keep)])

    with backend("reference"):
        expected = results(run, inputs)
    agree(results(run, inputs), expected)
    agree(results(parts, inputs), expected)


def test_routed_where_all_choose_the_same():
    inputs = qkv()
    chosen = torch.full((2, 4, N, 1), 3)
    with backend("reference"):
        expected = results(lambda: routed.attend(*inputs, chosen, 16), inputs)
    agree(results(lambda: routed.attend(*inputs, chosen, 16), inputs), expected)


def test_routed_without_a_choice():
    q, k, v = qkv()
    out, lse = routed.attend(q, k, v, torch.zeros(2, 4, N, 0, dtype=torch.long), 16)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_routed_compiles_as_one_graph():
    q, k, v = qkv(n=50, m=50)
    keep = torch.rand(2, 50) < 0.6

    def run(q, k, v, chosen, keep):
        own = masks.causal() & masks.same_block(8)
        return routed.attend(q, k, v, chosen, 8, mask=masks.keys(keep), always=own)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the sizes of groups are those of each call
        chosen = choice(50, 7, 3)
        chosen = chosen.masked_fill(chosen == torch.arange(50)[:, None] // 8, -1)
        expected = results(lambda c=chosen: run(q, k, v, c, keep), (q, k, v))
        agree(results(lambda c=chosen: compiled(q, k, v, c, keep), (q, k, v)), expected)


@pytest.mark.parametrize("value_dim", [8, 12])
@pytest.mark.parametrize("causal", [False, True])
def test_own_blocks_beside_chosen_ones(causal, value_dim):
    q, k, v = (torch.randn(1, 2, 256, d, dtype=torch.float64, requires_grad=True) for d in (8, 8, value_dim))
    block = torch.arange(256) // 32
    chosen = torch.where(block > 0, block - 1, -1).view(1, 1, -1, 1).expand(1, 2, -1, -1)
    own = masks.same_block(32)
    own = masks.causal() & own if causal else own

    def run():
        y, _ = routed.attend(q, k, v, chosen, 32, always=own)
        return y, *torch.autograd.grad(y.square().sum(), (q, k, v))

    fast = run()
    with backend("reference"):
        for got, expected in zip(fast, run(), strict=True):
            torch.testing.assert_close(got, expected)


def test_groups_waste_little():
    """Rows of tiles, for each pair of a query with a block it chose."""
    chosen = torch.rand(2, 4096, 32).topk(4, -1).indices
    groups = routed._group(chosen, 32)
    assert groups.rows <= 1.1 * chosen.numel()
    assert sum((~tiles.empty).sum() for tiles in groups.tiles) == chosen.numel()


# FlexAttention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("everything", "pairs", "pairs in a window")])
def test_block_masks_hold_every_visible_pair(rule):
    mask = RULES[rule]()
    n, m = 203, 203
    made = flex.block_mask(mask, n, m, torch.device("cpu"))
    visible = mask.dense(2, 4, n, m).flatten(0, 1)
    read = made.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :m]
    assert not (visible.any(0) & ~read).any()
    for row, count in enumerate(made.full_kv_num_blocks[0, 0].tolist()):
        for column in made.full_kv_indices[0, 0, row, :count].tolist():
            assert visible[:, 128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)].all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on CPU needs a compiler")
def test_flex_attention_agrees():
    """Compiled on CPU, which has the forward pass only."""
    mask = masks.window(20) & masks.keys(half(300)) | masks.sink(0)
    q, k, v = (t.detach() for t in qkv(n=300, m=300, dim=16, value_dim=16, dtype=torch.float32))
    with backend("flex"):
        out = sparse.attend(q, k, v, mask=mask)
        with pytest.raises(CrosslightError, match="flex"):
            sparse.attend_with_lse(q, k, v, mask=mask)
    assert (out - dense.attend(q, k, v, mask=mask)).abs().max() < 1e-5
