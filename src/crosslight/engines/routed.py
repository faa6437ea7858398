"""Routed attention: each query of each head reads the few blocks of keys that it chose.

Queries are grouped by the block they chose and each group is cut into tiles of a fixed number of rows, so that one
batched matrix product serves many groups of any size. The parts of a query are joined by their log-sum-exp. The
backward pass keeps the groups and computes the tiles again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslight.engines import masks, sparse, tiles
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Query = Float[Tensor, "batch heads n dim"]
    Key = Float[Tensor, "batch kv_heads m dim"]
    Value = Float[Tensor, "batch kv_heads m value_dim"]
    Chosen = Int[Tensor, "batch heads n choices"]
    Out = Float[Tensor, "batch heads n value_dim"]
    LSE = Float[Tensor, "batch heads n"]

#: Numbers that the parts of the queries may take before they are joined; above it heads are taken in turns. Twice as
#: many would be 64 MiB, which the allocator gives back to the system and gets as fresh pages each time.
BUFFER = 1 << 23
_NONE = masks.pack(None)[0]


def attend(
    q: Query,
    k: Key,
    v: Value,
    chosen: Chosen,
    block_size: int,
    *,
    mask: Mask | None = None,
    always: Mask | None = None,
    scale: float | None = None,
) -> tuple[Out, LSE]:
    """softmax(q k^T * scale) v over the keys of the chosen blocks, and the log-sum-exp for `sparse.merge`.

    Args:
        q, k, v: (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, value_dim); heads is a
            multiple of kv_heads.
        chosen: numbers of blocks of ``block_size`` keys, different ones for a query; -1 for none. No gradient.
        mask: of the keys in the chosen blocks, those that may be read.
        always: keys that are read whatever was chosen. They must not lie in a block that the query chose.
        scale: 1/sqrt(dim) unless given.

    Returns:
        (batch, heads, n, value_dim) and (batch, heads, n); 0 and -inf for queries with nothing to read.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if forced() == "reference" or sparse.tiny(q, k):
        rule: Mask = masks.Pairs(visible(chosen, block_size, k.shape[2]))
        rule = rule if mask is None else rule & mask
        return sparse.attend_with_lse(q, k, v, mask=rule if always is None else rule | always, scale=scale)
    # Once here, and not in every pass.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    text, tensors = sparse.pack(mask)
    text_always, tensors_always = sparse.pack(always)
    arguments = (q, k, v, chosen, tensors, tensors_always, text, text_always, block_size, scale)
    if torch.compiler.is_compiling():
        return _routed_operator(*arguments)
    return _Routed.apply(*arguments)


def visible(chosen: Chosen, block_size: int, m: int) -> Bool[Tensor, "batch heads n m"]:
    """The boolean matrix of a choice of blocks."""
    blocks = math.ceil(m / block_size)
    table = chosen.new_zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool)
    table.scatter_(-1, chosen.masked_fill(chosen < 0, blocks), True)
    return table[..., :blocks].repeat_interleave(block_size, -1)[..., :m]


# Own blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Squares:
    """The processor's fused kernel on blocks of a sequence that read themselves, where ``always`` says no more than
    that: such small tiles are dear in many operators."""

    size: int
    causal: bool

    @classmethod
    def of(cls, text: str, tensors: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> _Squares | None:
        rule = masks.unpack(text, tensors)
        causal = isinstance(rule, masks.And) and isinstance(rule.left, masks.Causal)
        block = rule.right if isinstance(rule, masks.And) and causal else rule
        fits = q.device.type == "cpu" and q.shape == k.shape == v.shape
        if not (fits and isinstance(block, masks.SameBlock) and q.shape[2] % block.size == 0):
            return None
        return cls(block.size, causal)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        heads = (self._cut(x) for x in (q, k, v))
        out, lse = _fused(*heads, is_causal=self.causal, scale=scale)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float
    ) -> list[Tensor]:
        """The share of these pairs, where ``out`` and ``lse`` are those of whole rows."""
        heads = (self._cut(x) for x in (grad, q, k, v, out))
        rows = lse.reshape(-1, 1, self.size)
        by = _fused_backward(*heads, rows, 0.0, self.causal, scale=scale)
        return [one.reshape(x.shape) for one, x in zip(by, (q, k, v), strict=True)]

    def _cut(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, self.size, x.shape[3])


_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# The executor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """Tiles of one size: tile t stands for ``block[t]`` of head ``head[t]``, and its rows are the queries ``query[t]``.
    Heads and queries are counted from the first one of the turn."""

    query: Int[Tensor, "tiles rows"]
    #: Rows that are left over, in which the first query of the tile stands again.
    empty: Bool[Tensor, "tiles rows"]
    block: Int[Tensor, "tiles"]
    head: Int[Tensor, "tiles"]


@dataclass(frozen=True)
class _Groups:
    """The pairs (query, chosen block) of a few heads: whole tiles, and smaller ones for what is left of each group."""

    tiles: tuple[_Tiles, ...]
    #: The row in which each pair lies, those of the first tiles first; -1 for the choice -1.
    row: Int[Tensor, "queries choices"]

    @property
    def rows(self) -> int:
        return sum(tiles.query.numel() for tiles in self.tiles)


def _group(chosen: Int[Tensor, "heads n choices"], blocks: int) -> _Groups:
    heads, n, choices = chosen.shape
    device = chosen.device
    # About half of the middle group; and a quarter of this for the rest, so that little of the last tile is empty.
    size = min(256, max(16, 1 << (n * choices // blocks).bit_length() >> 2))
    small = max(16, size // 4)
    nowhere = heads * blocks
    group = chosen + torch.arange(heads, device=device).view(-1, 1, 1) * blocks
    # Numbers of 16 bits are sorted ten times as fast.
    group = group.masked_fill(chosen < 0, nowhere).flatten().to(torch.int16 if nowhere < 1 << 15 else torch.int32)
    group, pair = group.sort(stable=True)
    counts = torch.bincount(group, minlength=nowhere + 1)[:nowhere]
    filled = (counts + small - 1) // small * small
    whole, rest = filled // size, filled % size // small
    count, wholes, rests = torch.stack([counts.sum(), whole.sum(), rest.sum()]).tolist()
    group, pair = group[:count].long(), pair[:count]
    # A pair's place in its group; whole tiles start with the first of the group, the others after all whole ones.
    place = torch.arange(count, device=device) - (counts.cumsum(0) - counts)[group]
    first = (whole.cumsum(0) - whole) * size
    after = wholes * size + (rest.cumsum(0) - rest) * small - whole * size
    place += torch.where(place < (whole * size)[group], first[group], after[group])
    query = torch.full((wholes * size + rests * small,), -1, device=device)
    query[place] = pair // choices
    row = torch.full((heads * n * choices,), -1, device=device)
    row[pair] = place
    numbers = torch.arange(nowhere, device=device)

    def tiles_of(query: Tensor, rows: int, each: Tensor, total: int) -> _Tiles:
        query = query.view(total, rows)
        empty, of = query < 0, torch.repeat_interleave(numbers, each, output_size=total)
        return _Tiles(torch.where(empty, query[:, :1], query), empty, of % blocks, of // blocks)

    parts = query.split([wholes * size, rests * small])
    both = tiles_of(parts[0], size, whole, wholes), tiles_of(parts[1], small, rest, rests)
    return _Groups(both, row.view(heads * n, choices))


class _Work:
    """One call in the layout of the tiles: queries (batch * heads, n, dim), and tables of blocks of keys
    (batch * kv_heads * blocks, block_size, dim)."""

    def __init__(self, q: Tensor, k: Tensor, chosen: Tensor, text: str, tensors: list[Tensor], size: int) -> None:
        self.batch, self.heads, self.n = q.shape[:3]
        self.kv_heads, self.m = k.shape[1:3]
        self.size, self.blocks = size, math.ceil(k.shape[2] / size)
        self.rule, self.chosen = masks.unpack(text, tensors), chosen.flatten(0, 1)
        self.device, self.dtype = q.device, tiles.working_dtype(q.dtype)

    def table(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, -self.m % self.size)) if self.m % self.size else x
        return x.reshape(-1, self.size, x.shape[3])

    def untable(self, x: Tensor, like: Tensor) -> Tensor:
        return x.view(self.batch, self.kv_heads, -1, x.shape[2])[:, :, : self.m].to(like.dtype)

    def turns(self, width: int, kept: dict[int, _Groups]) -> Iterator[tuple[int, int, _Groups]]:
        """A few heads at a time: first, last, and their groups, which are looked up in ``kept`` or put there."""
        total = self.batch * self.heads
        several = max(1, BUFFER // max(1, self.n * self.chosen.shape[2] * width))
        for first in range(0, total, several):
            stop = min(first + several, total)
            if first not in kept:
                kept[first] = _group(self.chosen[first:stop], self.blocks)
            yield first, stop, kept[first]

    def chunks(
        self, first: int, groups: _Groups
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, tiles.Hidden | None]]:
        """Of a turn that starts at head ``first``, for a few tiles of one size: where their rows are, their queries,
        which of these are empty, their blocks in the table, and what is hidden."""
        done = 0
        for level in groups.tiles:
            head = level.head + first
            batch, head = head // self.heads, head % self.heads
            block = (batch * self.kv_heads + head // (self.heads // self.kv_heads)) * self.blocks + level.block
            step = max(1, sparse.CHUNK // (level.query.shape[1] * self.size))
            for start in range(0, len(level.query), step):
                here = slice(start, start + step)
                query, hidden = level.query[here], None
                filled = slice(done, done + query.numel())
                done = filled.stop
                if self.rule is not None or self.m % self.size:
                    hidden = self._hidden(batch[here], head[here], query % self.n, level.block[here])
                yield filled, query, level.empty[here], block[here], hidden

    def _hidden(self, b: Tensor, h: Tensor, i: Tensor, block: Tensor) -> tiles.Hidden:
        j = (block[:, None] * self.size + torch.arange(self.size, device=self.device))[:, None]
        seen = j < self.m
        if self.rule is not None:
            seen = seen & self.rule.visible(b[:, None, None], h[:, None, None], i[..., None], j.clamp(max=self.m - 1))
        return tiles.Hidden.of(seen[:, None], self.dtype)


def _buffer(old: Tensor, rows: int, width: int) -> Tensor:
    """Room for rows, the same memory from turn to turn: fresh pages cost more than what is written to them."""
    if old.shape[0] >= rows:
        return old
    return old.new_empty(rows + rows // 8, width)


def _sum_rows(table: Tensor, row: Int[Tensor, "queries choices"], share: Tensor) -> Tensor:
    """The weighted sum of each query's rows."""
    if not table.shape[0]:
        return table.new_zeros(row.shape[0], table.shape[1])
    return F.embedding_bag(row.clamp(min=0), table, mode="sum", per_sample_weights=share)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    tensors_always: list[Tensor],
    text: str,
    text_always: str,
    block_size: int,
    scale: float,
    *,
    kept: dict[int, _Groups] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the groups stay in ``kept`` for the backward pass."""
    with torch.autocast(q.device.type, enabled=False):
        work, room = _Work(q, k, chosen, text, tensors, block_size), tiles.Room()
        if text_always == _NONE:
            out = q.new_zeros(*q.shape[:3], v.shape[3])
            lse = q.new_full(q.shape[:3], -math.inf, dtype=work.dtype)
        elif squares := _Squares.of(text_always, tensors_always, q, k, v):
            out, lse = squares.forward(q, k, v, scale)
        else:
            out, lse = sparse.forward(q, k, v, tensors_always, text_always, scale, True)
        flat_q, table_k, table_v = q.flatten(0, 1), work.table(k), work.table(v)
        part = flat_q.new_empty(0, v.shape[3], dtype=work.dtype)
        for first, stop, groups in work.turns(max(q.shape[3], v.shape[3]), {} if kept is None else kept):
            here_q = flat_q[first:stop].reshape(-1, q.shape[3])
            part = _buffer(part, groups.rows, v.shape[3])
            part_lse = part.new_full((groups.rows + 1,), -math.inf)  # the last is that of the choice -1
            for filled, query, _, block, hidden in work.chunks(first, groups):
                query, rows = query.flatten(), query.shape[1]
                _, row_lse = tiles.forward(
                    room.rows("q", here_q, query).to(work.dtype).view(1, -1, 1, rows, q.shape[3]),
                    room.rows("k", table_k, block).to(work.dtype)[None],
                    room.rows("v", table_v, block).to(work.dtype)[None],
                    hidden,
                    room,
                    into=part[filled].view(-1, rows, v.shape[3]),
                    scale=scale,
                )
                assert row_lse is not None
                part_lse[filled] = row_lse.flatten()
            here_out, here_lse = out.flatten(0, 1)[first:stop], lse.flatten(0, 1)[first:stop]
            parts = torch.cat([here_lse.flatten()[:, None], part_lse[groups.row]], 1)
            top = parts.amax(1, keepdim=True)
            shares = (parts - top.masked_fill(top == -math.inf, 0.0)).exp_()
            total = shares.sum(1, keepdim=True)
            shares = shares / total.masked_fill(total == 0, 1.0)
            joined = _sum_rows(part, groups.row, shares[:, 1:].contiguous())
            joined.addcmul_(here_out.flatten(0, 1).to(work.dtype), shares[:, :1])
            here_out.copy_(joined.view_as(here_out))
            here_lse.copy_((top + total.log()).view_as(here_lse))  # -inf + log(0) where there is nothing
        return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    tensors_always: list[Tensor],
    out: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    text: str,
    text_always: str,
    block_size: int,
    scale: float,
    *,
    kept: dict[int, _Groups] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, where the gradient by the log-sum-exp is none: the fused kernel makes its own delta of it."""
    with torch.autocast(q.device.type, enabled=False):
        work, room = _Work(q, k, chosen, text, tensors, block_size), tiles.Room()
        lse = sparse.whole_rows(lse)
        if text_always == _NONE:
            by_q, by_k, by_v = (torch.zeros_like(x, dtype=work.dtype) for x in (q, k, v))
        elif out is not None and (squares := _Squares.of(text_always, tensors_always, q, k, v)):
            by_q, by_k, by_v = (x.to(work.dtype) for x in squares.backward(q, k, v, out, lse, grad, scale))
        else:
            by = sparse.backward(q, k, v, tensors_always, grad, delta, text_always, scale, lse)
            by_q, by_k, by_v = (x.to(work.dtype) for x in by)
        # The sums of both ways of reading gather in the same place.
        flat_q, flat_grad, table_k, table_v = q.flatten(0, 1), grad.flatten(0, 1), work.table(k), work.table(v)
        table_by_k, table_by_v = work.table(by_k), work.table(by_v)
        delta, lse = delta.flatten(0, 1), lse.flatten(0, 1)
        part = flat_q.new_empty(0, q.shape[3], dtype=work.dtype)
        for first, stop, groups in work.turns(max(q.shape[3], v.shape[3]), {} if kept is None else kept):
            here_q = flat_q[first:stop].reshape(-1, q.shape[3])
            here_grad = flat_grad[first:stop].reshape(-1, v.shape[3])
            here_delta, here_lse = delta[first:stop].flatten(), lse[first:stop].flatten()
            part = _buffer(part, groups.rows, q.shape[3])
            for filled, query, empty, block, hidden in work.chunks(first, groups):
                query, rows = query.flatten(), query.shape[1]
                # What stands in empty rows counts e^-40 times, which no sum notices; e^-inf would be slow.
                row_lse = here_lse.index_select(0, query).add_(empty.flatten(), alpha=40)
                _, grad_k, grad_v = tiles.backward(
                    room.rows("q", here_q, query).to(work.dtype).view(1, -1, 1, rows, q.shape[3]),
                    room.rows("k", table_k, block).to(work.dtype)[None],
                    room.rows("v", table_v, block).to(work.dtype)[None],
                    hidden,
                    room,
                    room.rows("grad", here_grad, query).to(work.dtype).view(1, -1, 1, rows, v.shape[3]),
                    here_delta.index_select(0, query).view(1, -1, 1, rows),
                    row_lse.view(1, -1, 1, rows),
                    into=part[filled].view(-1, rows, q.shape[3]),
                    scale=scale,
                )
                table_by_k.flatten(1).index_add_(0, block, grad_k.view(block.shape[0], -1))
                table_by_v.flatten(1).index_add_(0, block, grad_v.view(block.shape[0], -1))
            here_by = by_q.flatten(0, 1)[first:stop]
            here_by += _sum_rows(part, groups.row, (groups.row >= 0).to(part.dtype)).view_as(here_by)
        return by_q.to(q.dtype), work.untable(table_by_k, k), work.untable(table_by_v, v)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, chosen, tensors, tensors_always, *how: Any):
        ctx.set_materialize_grads(False)
        ctx.kept = {}
        out, lse = _forward(q, k, v, chosen, tensors, tensors_always, *how, kept=ctx.kept)
        ctx.save_for_backward(q, k, v, chosen, out, lse, *tensors, *tensors_always)
        ctx.how, ctx.split = how, len(tensors)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad, grad_lse):
        q, k, v, chosen, out, lse, *tensors = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        tensors, always = tensors[: ctx.split], tensors[ctx.split :]
        delta = sparse.delta_of(grad, out, grad_lse)
        out = out if grad_lse is None else None
        by = _backward(q, k, v, chosen, tensors, always, out, lse, grad, delta, *ctx.how, kept=ctx.kept)
        return *by, *[None] * 7


# As in `engines.sparse`: operators while torch.compile traces, here also because the sizes of groups depend on data.


@torch.library.custom_op("crosslight::routed", mutates_args=())
def _routed_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    tensors_always: list[Tensor],
    text: str,
    text_always: str,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, chosen, tensors, tensors_always, text, text_always, block_size, scale)


@_routed_operator.register_fake
def _(q, k, v, chosen, tensors, tensors_always, text, text_always, block_size, scale):
    dtype = tiles.working_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("crosslight::routed_backward", mutates_args=())
def _routed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    tensors_always: list[Tensor],
    out: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    text: str,
    text_always: str,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    how = (text, text_always, block_size, scale)
    by = _backward(q, k, v, chosen, tensors, tensors_always, out, lse, grad, delta, *how)
    return by[0].contiguous(), by[1].contiguous(), by[2].contiguous()


@_routed_backward.register_fake
def _(q, k, v, chosen, tensors, tensors_always, out, lse, grad, delta, text, text_always, block_size, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, chosen, tensors, tensors_always, *how = inputs
    ctx.save_for_backward(q, k, v, chosen, *output, *tensors, *tensors_always)
    ctx.how, ctx.split, ctx.count = how, len(tensors), len(tensors_always)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple:
    q, k, v, chosen, out, lse, *tensors = ctx.saved_tensors
    tensors, always = tensors[: ctx.split], tensors[ctx.split :]
    delta = sparse.delta_of(grad, out, grad_lse)
    # Here the gradient by the log-sum-exp is never none.
    by = _routed_backward(q, k, v, chosen, tensors, always, None, lse, grad, delta, *ctx.how)
    return *by, None, [None] * ctx.split, [None] * ctx.count, None, None, None, None


_routed_operator.register_autograd(_differentiate, setup_context=_keep)
