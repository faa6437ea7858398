"""UniBA: the equations block by block, rows of blocks from a cache, one-way flow, one block, memory."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.inf_dit import UniBA
from crosslight.errors import CrosslightError


def layer(dim: int = 16, heads: int = 2, **options):
    attn = crosslight.create("inf-dit", **{"dim": dim, "heads": heads, "block": 2, **options}).double()
    torch.nn.init.normal_(attn.core.relation)
    return attn


def tokens(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, height * width, 16, dtype=torch.double)


def turned(x: torch.Tensor, position: float, base: float = 10_000.0) -> torch.Tensor:
    """Neighbouring channels as complex numbers, turned."""
    rate = base ** (-torch.arange(x.shape[-1] // 2).double() / (x.shape[-1] // 2))
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(rate), position * rate)).flatten(-2)


def test_equals_the_equations_block_by_block():
    """The blocks of the released code: a map whose edge is repeated above and to the left, then shifted copies."""
    attn, height, width = layer(), 6, 4
    x = tokens(height, width)
    q, k, v = (p(x).unflatten(2, (2, 8)).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    q, k = attn.core.norm_q(q), attn.core.norm_k(k)
    half = [torch.stack([turned(t[:, :, i, :4], i // width) for i in range(24)], 2) for t in (q, k)]
    rest = [torch.stack([turned(t[:, :, i, 4:], i % width) for i in range(24)], 2) for t in (q, k)]
    q, k = (torch.cat(pair, -1) for pair in zip(half, rest, strict=True))

    def blocks(t: torch.Tensor) -> torch.Tensor:  # (batch, heads, rows, columns, 4, d)
        return t.unflatten(2, (3, 2, 2, 2)).transpose(3, 4).flatten(4, 5)

    def with_edge(t: torch.Tensor) -> torch.Tensor:
        t = torch.cat([t[:, :, :1], t], 2)
        return torch.cat([t[:, :, :, :1], t], 3)

    def around(t: torch.Tensor, relation: torch.Tensor | None) -> torch.Tensor:
        edge = with_edge(t)
        four = [t, edge[:, :, :-1, :-1], edge[:, :, 1:, :-1], edge[:, :, :-1, 1:]]
        if relation is not None:
            four = [part + relation[None, :, i, None, None, None] for i, part in enumerate(four)]
        return torch.cat(four, 4)

    weights = (blocks(q) @ around(blocks(k), attn.core.relation).mT / 8**0.5).softmax(-1)
    y = weights @ around(blocks(v), None)
    y = y.unflatten(4, (2, 2)).transpose(3, 4).flatten(2, 5)
    torch.testing.assert_close(attn(x, grid=(height, width)), attn.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("height", "width", "at_once"), [(6, 4, 2), (8, 6, 4), (7, 5, 2), (2, 2, 2)])
def test_rows_of_blocks_equal_the_whole_map(height, width, at_once):
    attn, x = layer(), tokens(height, width)
    whole, cache, parts = attn(x, grid=(height, width)), None, []
    for part in x.unflatten(1, (height, width)).split(at_once, 1):
        y, cache = attn.rows(part.flatten(1, 2), cache, width=width)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_the_cache_grows_with_the_width_alone():
    attn = layer()

    def cached(height: int, width: int) -> int:
        cache = None
        for _ in range(height // 2):
            _, cache = attn.rows(tokens(2, width), cache, width=width)
        return cache.k.shape[2] * cache.k.shape[3]

    assert [cached(height, 8) for height in (4, 16, 32)] == [16, 16, 16]
    assert [cached(4, width) for width in (4, 8, 16)] == [8, 16, 32]


def test_nothing_flows_from_below_or_from_the_right():
    attn, x = layer(), tokens(6, 6, batch=1).requires_grad_()
    y = attn(attn(x, grid=(6, 6)), grid=(6, 6)).unflatten(1, (3, 2, 3, 2))
    for r in range(3):
        for c in range(3):
            slope = torch.autograd.grad(y[:, r, :, c].square().sum(), x, retain_graph=True)[0]
            seen = slope.unflatten(1, (3, 2, 3, 2)).abs().sum((0, 2, 4, 5)) > 0
            assert torch.equal(seen, torch.tensor([[i <= r and j <= c for j in range(3)] for i in range(3)]))


def test_one_block_without_relations_is_full_attention():
    """A softmax does not feel that its keys are there four times."""
    attn, x = layer(block=4, rotary=False), tokens(4, 4)
    torch.nn.init.zeros_(attn.core.relation)
    q, k, v = (p(x).unflatten(2, (2, 8)).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    full = F.scaled_dot_product_attention(attn.core.norm_q(q), attn.core.norm_k(k), v)
    torch.testing.assert_close(attn(x, grid=(4, 4)), attn.out(full.transpose(1, 2).flatten(2)))


def test_bad_input_is_named():
    with pytest.raises(CrosslightError, match="head_dim: got 6, expected a multiple of 4"):
        UniBA(2, 6)
    attn = layer()
    _, cache = attn.rows(tokens(3, 4), width=4)
    with pytest.raises(CrosslightError, match="rows after 3"):
        attn.rows(tokens(2, 4), cache, width=4)
    with pytest.raises(CrosslightError, match="position: got .*, expected None"):
        layer(position="rope").rows(tokens(2, 4), width=4)
