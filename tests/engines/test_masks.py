"""Symbolic masks: the algebra, the three questions they answer, and taking them apart."""

import math
import random

import pytest
import torch

from crosslight.engines import masks
from crosslight.engines.masks import Neighbourhood
from crosslight.errors import CrosslightError

N, M = 37, 41


def simple(draw: random.Random) -> masks.Mask:
    return draw.choice(
        [
            masks.causal,
            lambda: masks.window(draw.randrange(0, 20)),
            lambda: masks.dilated(draw.randrange(1, 6)),
            lambda: masks.sink(draw.randrange(0, 9)),
            lambda: masks.same_block(draw.randrange(1, 12)),
            lambda: masks.keys(torch.rand(2, M) < draw.choice([0.1, 0.5, 1.1])),
            lambda: masks.segments(
                torch.randint(0, 4, (2, N)).sort(1).values, torch.randint(0, 4, (2, M)).sort(1).values
            ),
            lambda: masks.segments(torch.randint(0, 3, (2, N)), torch.randint(0, 3, (2, M))),
            lambda: masks.as_mask(torch.rand(2, 3, N, M) < 0.5, batch=2, heads=3, n=N, m=M),
            lambda: Neighbourhood((6, 7), *neighbourhood(draw, 2)),
            lambda: Neighbourhood((2, 3, 7), *neighbourhood(draw, 3)),
            lambda: Neighbourhood((42,), *neighbourhood(draw, 1)),
        ]
    )()


def neighbourhood(draw: random.Random, rank: int) -> tuple:
    return (
        tuple(draw.randrange(1, 6) for _ in range(rank)),
        tuple(draw.randrange(1, 4) for _ in range(rank)),
        tuple(draw.random() < 0.3 for _ in range(rank)),
    )


def combined(draw: random.Random) -> masks.Mask:
    mask = simple(draw)
    for _ in range(draw.randrange(0, 3)):
        other = simple(draw)
        mask = draw.choice([lambda a, b: a & b, lambda a, b: a | b, lambda a, b: a & ~b])(mask, other)
    return mask


@pytest.mark.parametrize("seed", range(150))
def test_blocks_never_lie(seed):
    """A tile with a visible pair is named, a tile that is said to be whole is whole."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    mask = combined(draw)
    matrix = mask.dense(2, 3, N, M).expand(2, 3, N, M)
    for block_q, block_k in ((1, 1), (4, 4), (7, 5), (64, 64)):
        i0, j0 = torch.arange(0, N, block_q)[:, None], torch.arange(0, M, block_k)
        i1, j1 = (i0 + block_q).clamp(max=N) - 1, (j0 + block_k).clamp(max=M) - 1
        some, every = mask.blocks((i0, i1, j0, j1))
        for a in range(i0.shape[0]):
            for b in range(j0.shape[0]):
                tile = matrix[:, :, i0[a, 0] : i1[a, 0] + 1, j0[b] : j1[b] + 1]
                assert bool(some[a, b]) or not tile.any(), (mask, a, b)
                assert not bool(every[a, b]) or tile.all(), (mask, a, b)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.window(5),
        masks.dilated(3),
        masks.sink(6),
        masks.same_block(5),
        masks.causal() & masks.window(4),
    ],
    ids=str,
)
def test_blocks_of_simple_rules_are_exact(mask):
    """No tile is read in vain."""
    matrix = mask.dense(1, 1, 40, 40)[0, 0]
    for size in (4, 8):
        start = torch.arange(0, 40, size)
        some, _ = mask.blocks((start[:, None], start[:, None] + size - 1, start, start + size - 1))
        assert torch.equal(some, matrix.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1))


@pytest.mark.parametrize("seed", range(40))
def test_properties_hold(seed):
    """`shared`: the same for all entries and heads. `period`: moving both positions changes nothing."""
    torch.manual_seed(seed)
    mask = combined(random.Random(1000 + seed))
    matrix = mask.dense(2, 3, N, M).expand(2, 3, N, M)
    if mask.shared:
        assert (matrix == matrix[:1, :1]).all()
    if mask.period and mask.period < N:
        p = mask.period
        assert torch.equal(matrix[..., p:, p:], matrix[..., : N - p, : M - p])


@pytest.mark.parametrize("seed", range(40))
def test_pack_and_unpack(seed):
    torch.manual_seed(seed)
    mask = combined(random.Random(seed))
    text, tensors = masks.pack(mask)
    assert isinstance(text, str)
    again = masks.unpack(text, tensors)
    assert torch.equal(again.dense(2, 3, N, M), mask.dense(2, 3, N, M))
    assert masks.pack(again)[0] == text
    assert masks.unpack(*masks.pack(None)) is None


def test_algebra():
    i, j = torch.arange(9)[:, None], torch.arange(9)
    mask = masks.causal() & masks.window(2) | masks.sink(1)
    assert torch.equal(mask.dense(1, 1, 9, 9)[0, 0], (j <= i) & (i - j <= 2) | (j < 1))
    assert torch.equal((~mask).dense(1, 1, 9, 9), ~mask.dense(1, 1, 9, 9))
    assert len((masks.causal() & masks.window(1) & masks.sink(2)).terms()) == 3
    flag, keep, rest = masks.split(masks.causal() & masks.keys(torch.ones(1, 9, dtype=torch.bool)) & masks.window(2))
    assert flag
    assert keep.shape == (1, 9)
    assert rest == masks.window(2)


def test_offset_moves_the_queries():
    mask = masks.causal() & masks.window(3)
    assert torch.equal(mask.dense(1, 1, 2, 9, offset=7), mask.dense(1, 1, 9, 9)[:, :, 7:])


def test_tensor_masks_become_rules():
    keep = torch.rand(2, 5) < 0.5
    assert torch.equal(
        masks.as_mask(keep, batch=2, heads=3, n=4, m=5).dense(2, 3, 4, 5)[:, 0], keep[:, None].expand(2, 4, 5)
    )
    pairs = torch.rand(2, 4, 5) < 0.5
    assert torch.equal(masks.as_mask(pairs, batch=2, heads=3, n=4, m=5).dense(2, 3, 4, 5)[:, 0], pairs)
    with pytest.raises(CrosslightError, match=r"mask: got bool \(2, 4\)"):
        masks.as_mask(torch.ones(2, 4, dtype=torch.bool), batch=2, heads=3, n=4, m=5)
    for wrong in (
        lambda: masks.window(-1),
        lambda: masks.dilated(0),
        lambda: masks.sink(-1),
        lambda: masks.same_block(0),
    ):
        with pytest.raises(CrosslightError, match="expected a number"):
            wrong()


def windows(side: int, kernel: int, dilation: int, causal: bool) -> list[set[int]]:
    """The catalogue's words, cell by cell."""
    out = []
    for cell in range(side):
        group = list(range(cell % dilation, side, dilation))
        place = group.index(cell)
        if causal:
            out.append(set(group[max(0, place - kernel + 1) : place + 1]))
        else:
            start = max(0, min(place - kernel // 2, len(group) - kernel))
            out.append(set(group[start : start + kernel]))
    return out


@pytest.mark.parametrize("seed", range(30))
def test_neighbourhood_is_what_the_paper_says(seed):
    draw = random.Random(seed)
    rank = draw.randrange(1, 4)
    grid = tuple(draw.randrange(1, 9) for _ in range(rank))
    kernel, dilation, causal = neighbourhood(draw, rank)
    rule = Neighbourhood(grid, kernel, dilation, causal)
    n = math.prod(grid)
    matrix = rule.dense(1, 1, n, n)[0, 0]
    axes = [windows(*axis) for axis in zip(grid, kernel, dilation, causal, strict=True)]
    cells = list(torch.cartesian_prod(*[torch.arange(side) for side in grid]).view(n, rank).tolist())
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            expected = all(b in axis[a] for axis, a, b in zip(axes, query, key, strict=True))
            assert bool(matrix[i, j]) == expected


def test_every_token_has_its_full_window():
    """Also in a corner, unlike a window that is padded with zeros."""
    rule = Neighbourhood((9, 12), (3, 5), (1, 2), (False, False))
    assert (rule.dense(1, 1, 108, 108).sum(-1) == 15).all()
