"""VMoBA: partitions of a grid, the selection by mass written out pair by pair, and attention under it."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.vmoba import CYCLE, VMoBA, partition_of
from crosslight.engines import masks, sparse
from crosslight.errors import CrosslightError

GRID = (5, 6, 7)  # ragged for every partition below
SIZES = {"slab": 2, "tile": (4, 4), "cube": (2, 4, 3)}
N = 5 * 6 * 7


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def qkv(n=N, heads=2, kv_heads=2, dim=8):
    shapes = [(heads, n), (kv_heads, n), (kv_heads, n)]
    return [torch.randn(2, h, m, dim, dtype=torch.float64).requires_grad_() for h, m in shapes]


def box_of(partition, token):
    """The box of a token of the grid, as a tuple of its numbers on the three axes."""
    t, h, w = token // 42, token // 7 % 6, token % 7
    return {"1d": (t // 2, 0, 0), "2d": (0, h // 4, w // 4), "3d": (t // 2, h // 4, w // 3)}[partition]


def selected_by_hand(q, k, boxes, tau, scope):
    """Own boxes, and the strongest other pairs one by one until the mass is reached; of one video."""
    heads, n = q.shape[:2]
    names = sorted(set(boxes))
    means = torch.stack([k[:, [j for j in range(n) if boxes[j] == c]].mean(1) for c in names], 1)
    gate = (q @ means.transpose(-1, -2)).detach()
    visible = torch.zeros(heads, n, len(names), dtype=torch.bool)
    pools = {}
    for h in range(heads):
        for i in range(n):
            for c in range(len(names)):
                pool = {"head": h, "query": (h, i), "block": c, "overall": 0}[scope]
                pools.setdefault(pool, []).append((h, i, c))
    for pairs in pools.values():
        g = torch.stack([gate[pair] for pair in pairs])
        u = ((g - g.min()) / (g.max() - g.min())).tolist()
        mass = 0.0
        for (h, i, c), value in zip(pairs, u, strict=True):
            if names[c] == boxes[i]:
                visible[h, i, c] = True
                mass += value
        for value, (h, i, c) in sorted(zip(u, pairs, strict=True), reverse=True):
            if mass >= tau * sum(u):
                break
            if names[c] != boxes[i]:
                visible[h, i, c] = True
                mass += value
    column = torch.tensor([names.index(box) for box in boxes])
    return visible[:, :, column]


@pytest.mark.parametrize("partition", CYCLE)
@pytest.mark.parametrize("scope", ["head", "query", "block", "overall"])
def test_selection_of_the_paper(partition, scope):
    q, k, v = qkv()
    core = VMoBA(2, 8, partition, **SIZES, tau=0.4, scope=scope)
    boxes = [box_of(partition, token) for token in range(N)]
    visible = torch.stack([selected_by_hand(q[b], k[b], boxes, 0.4, scope) for b in range(2)])
    assert torch.equal(core.weights(q, k, grid=GRID) > 0, visible)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    y = core(q, k, v, grid=GRID)
    torch.testing.assert_close(y, expected)
    goal = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (q, k, v), goal), torch.autograd.grad(expected, (q, k, v), goal), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("partition", CYCLE)
def test_all_of_the_mass_is_softmax_and_none_is_the_own_box(partition):
    q, k, v = qkv()
    everything = VMoBA(2, 8, partition, **SIZES, tau=1.0)
    torch.testing.assert_close(everything(q, k, v, grid=GRID), F.scaled_dot_product_attention(q, k, v))
    boxes = [box_of(partition, token) for token in range(N)]
    own = torch.tensor([[a == b for b in boxes] for a in boxes])
    nothing = VMoBA(2, 8, partition, **SIZES, tau=0.0)
    torch.testing.assert_close(nothing(q, k, v, grid=GRID), F.scaled_dot_product_attention(q, k, v, attn_mask=own))


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9])
def test_kept_mass_is_reached_and_no_pair_is_too_many(tau):
    q, k, _ = (t.detach() for t in qkv())
    core = VMoBA(2, 8, "3d", **SIZES, tau=tau)
    place, count, size = core.boxes(N, GRID, q.device)
    picked, box = core.select(q, k, place, count, size, None), place // size
    means = torch.stack([k[:, :, box == c].mean(2) for c in range(count)], 2)
    gate = (q @ means.transpose(-1, -2)).flatten(2)
    u = (gate - gate.amin(-1, keepdim=True)) / (gate.amax(-1, keepdim=True) - gate.amin(-1, keepdim=True))
    own = F.one_hot(box, count).bool().expand_as(picked).flatten(2)
    kept = picked.flatten(2)
    assert not (kept & own).any()
    share = (u * (kept | own)).sum(-1) / u.sum(-1)
    weakest = u.masked_fill(~kept, torch.inf).amin(-1) / u.sum(-1)
    assert (share >= tau - 1e-12).all()
    assert (share - weakest < tau).all()
    assert picked.sum((2, 3)).float().std() > 0  # heads and videos have budgets of their own
    assert picked.sum(3).float().std() > 0  # and so have queries


def test_planted_boxes_are_found_better_than_by_runs_and_top_k():
    """Queries and keys alike within a 3d box, queries of different strength: of at most as many keys as top-2 of runs
    reads, the selection by mass holds more of the softmax, in the mean of five drawings."""
    grid, cube = (4, 8, 8), (2, 4, 4)
    token = torch.arange(256)
    box = (token // 64 // 2) * 4 + (token // 8 % 8 // 4) * 2 + token % 8 // 4
    held = {"mass": 0.0, "runs": 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        centres = torch.randn(8, 16, dtype=torch.float64)
        k = (centres[box] + 0.3 * torch.randn(256, 16, dtype=torch.float64))[None, None]
        q = (centres[box] * torch.rand(256, 1, dtype=torch.float64) * 3)[None, None]
        softmax = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        runs = (q @ k.unflatten(2, (8, 32)).mean(3).transpose(-1, -2)).topk(2, -1).indices
        other = torch.zeros(1, 1, 256, 8, dtype=torch.bool).scatter(-1, runs, True).repeat_interleave(32, -1)
        read = [VMoBA(1, 16, cube=cube, tau=tau / 100).visible(q, k, None, grid) for tau in range(20, 60, 2)]
        sparse_enough = [r for r in read if r.double().mean() <= 0.25]
        held["mass"] += float((softmax * sparse_enough[-1]).sum()) / 256 / 5
        held["runs"] += float((softmax * other).sum()) / 256 / 5
    assert held["mass"] > held["runs"] + 0.01


def test_places_are_a_permutation_with_boxes_in_a_row():
    for partition in CYCLE:
        place, count, size = VMoBA(2, 8, partition, **SIZES).boxes(N, GRID, torch.device("cpu"))
        assert len(set(place.tolist())) == N
        assert int(place.max()) < count * size
        groups = {}
        for token in range(N):
            groups.setdefault(int(place[token]) // size, set()).add(box_of(partition, token))
        assert all(len(boxes) == 1 for boxes in groups.values())


def test_masked_tokens_take_no_part():
    q, k, v = (t.detach() for t in qkv())
    keep = torch.rand(2, N) < 0.7
    keep[0, :50] = False
    core, mask = VMoBA(2, 8, "3d", **SIZES, tau=0.5), masks.keys(keep)
    y = core(q, k, v, mask=mask, grid=GRID)
    lost = ~keep[:, None, :, None]
    noisy = [torch.where(lost, 20 * torch.randn_like(t), t) for t in (q, k, v)]
    kept = keep[:, None, :, None].expand_as(y)
    torch.testing.assert_close(core(*noisy, mask=mask, grid=GRID)[kept], y[kept])
    torch.testing.assert_close(core.weights(q, k, mask=mask, grid=GRID) @ v, y)


def test_grouped_heads_choose_for_themselves():
    q, k, v = qkv(heads=4, kv_heads=2)
    core = VMoBA(4, 8, "3d", **SIZES)
    full = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(core(q, k, v, grid=GRID), core(q, *full, grid=GRID))


def test_layer_on_grids_of_all_ranks():
    attn = crosslight.create("vmoba", dim=16, heads=2, cube=(2, 2, 2)).double()
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    for grid in (None, (24,), (4, 6), (2, 3, 4)):
        weights = attn.weights(x, grid=grid)
        torch.testing.assert_close(attn.read(weights, x, grid=grid), attn(x, grid=grid))


def test_partitions_take_turns_and_bad_options():
    assert [partition_of(layer) for layer in range(4)] == ["1d", "2d", "3d", "1d"]
    core = crosslight.create("vmoba", dim=32, heads=4).core
    assert (core.partition, core.scope) == ("3d", "head")
    for wrong in ({"partition": "4d"}, {"slab": 0}, {"tile": (1, 0)}, {"cube": (1, 1)}, {"tau": 2.0}, {"scope": "all"}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("vmoba", dim=32, heads=4, **wrong)
