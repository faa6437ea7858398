"""The contract of kind token, on two levels.

A **core** works between projected heads: ``core(q, k, v)`` on (batch, heads, length, dim). Most papers change only
that. A **mechanism** is the whole layer, ``attn(x, context=z)`` on (batch, length, dim). `AttentionLayer` makes a
mechanism of any core; a paper that changes the projections, the heads or what surrounds them is a mechanism itself.

Both show the matrix they stand for. ``weights`` gives it and ``read`` applies a matrix in its place, so that
``attn.read(attn.weights(x), x)`` equals ``attn(x)``: the conformance suite holds the fast path to that, and steering
is ``attn.read(changed, x)``.

A layer by itself is the rule. A row that shares something between the layers of a model has a classmethod
``stack(depth, **options)``, which makes them together. Where what they share is computed from a stream, a layer that
``leads`` gives it by ``share(x)``, and the caller hands it as ``context`` to that layer and to those after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.cards import Card
from crosslight.engines import dense, masks, positions
from crosslight.engines.cache import KVCache
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Bias, Grid, Rotation
from crosslight.errors import CrosslightError, UnsupportedPattern, expect

if TYPE_CHECKING:
    from jaxtyping import Float

    Stream = Float[Tensor, "batch n dim"]
    Context = Float[Tensor, "batch m context_dim"]
    Heads = Float[Tensor, "batch heads n head_dim"]
    Weights = Float[Tensor, "batch heads n m"]


@dataclass(frozen=True)
class How:
    """How a call attends: the checked mask, and which of the four patterns it is."""

    mask: Mask | None = None
    causal: bool = False
    cross: bool = False
    grid: Grid | None = None

    @property
    def triangular(self) -> bool:
        """Query i may read keys j <= i only. In causal cross all of the context is visible."""
        return self.causal and not self.cross

    @property
    def pattern(self) -> str:
        return f"{'causal' if self.causal else 'noncausal'}-{'cross' if self.cross else 'self'}"


def head_width(dim: int, heads: int, head_dim: int | None = None) -> int:
    """``head_dim``, or an equal part of ``dim`` for each head.

    Raises:
        CrosslightError: ``heads`` is no positive int, or ``dim`` cannot be shared out among them.
    """
    expect(isinstance(heads, int) and heads > 0, "heads", heads, "a positive int")
    if head_dim is None:
        expect(isinstance(dim, int) and dim > 0, "dim", dim, "a positive int")
        expect(dim % heads == 0, "dim", dim, f"a multiple of heads = {heads} (or give head_dim)")
        return dim // heads
    expect(isinstance(head_dim, int) and head_dim > 0, "head_dim", head_dim, "a positive int")
    return head_dim


class Mechanism(nn.Module):
    """The contract of kind token: (batch, n, dim) reads (batch, m, context_dim) -> (batch, n, dim).

    The public methods check their input and then call the hook of the same name with a leading underscore, which is
    what a mechanism writes. In the hooks ``context`` is ``x`` itself for self-attention.
    """

    card: ClassVar[Card]
    #: Queries are learned: ``x`` may be None, and the output has as many tokens as there are queries.
    learned_queries: ClassVar[bool] = False

    def __init__(self, dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        expect(isinstance(dim, int) and dim > 0, "dim", dim, "a positive int")
        self.dim = dim
        self.context_dim = dim if context_dim is None else context_dim

    # What a mechanism writes ------------------------------------------------------------------------------------
    def _forward(self, x: Stream, context: Context, how: How) -> Stream:
        raise NotImplementedError

    def _weights(self, x: Stream, context: Context, how: How) -> Weights:
        raise NotImplementedError

    def _read(self, weights: Weights, x: Stream, context: Context, how: How) -> Stream:
        """The layer's output if ``weights`` were its attention matrix."""
        raise NotImplementedError

    def _step(self, x: Stream, cache: Any, context: Context | None, how: How) -> tuple[Stream, Any]:
        """Output for the next tokens and the cache after them; ``cache`` is None at the first token."""
        raise NotImplementedError

    # What a user calls ------------------------------------------------------------------------------------------
    def forward(
        self,
        x: Stream | None,
        context: Context | None = None,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        grid: Grid | None = None,
    ) -> Stream:
        """Attend.

        Args:
            x: the stream that asks, (batch, n, dim).
            context: the stream that is read, (batch, m, context_dim); x itself if None.
            mask: True = may be read: bool (batch, m), (batch, n, m), (batch, heads, n, m) or a symbolic `Mask`.
            causal: output i depends on x up to i only. All of a ``context`` stays visible.
            grid: the shape of x as a grid, (height, width) or (time, height, width), for mechanisms that use it.

        Returns:
            (batch, n, dim). A query with nothing to read gets a zero attention output.

        Raises:
            UnsupportedPattern: the mechanism has no such pattern.
            CrosslightError: a wrong width, rank, dtype, device or mask shape.
        """
        return self._forward(*self._checked(x, context, mask, causal, grid))

    def weights(
        self,
        x: Stream | None,
        context: Context | None = None,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        grid: Grid | None = None,
    ) -> Weights:
        """The matrix that the fast path stands for, (batch, heads, n, m). Quadratic: for looking, not for training."""
        return self._weights(*self._checked(x, context, mask, causal, grid))

    def read(
        self,
        weights: Weights,
        x: Stream | None,
        context: Context | None = None,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        grid: Grid | None = None,
    ) -> Stream:
        """The output if ``weights`` were the attention matrix of this call."""
        return self._read(weights, *self._checked(x, context, mask, causal, grid))

    def step(
        self, x: Stream, cache: Any = None, *, context: Context | None = None, mask: Mask | Tensor | None = None
    ) -> tuple[Stream, Any]:
        """Decode: the output for the next token(s) and the cache to pass with the ones after.

        Args:
            x: (batch, 1, dim).
            cache: None at the first token, then what the previous call returned; a cache is used once.
            context: for cross-attention, at the first token; its keys and values then live in the cache.
            mask: key padding of the context, at the first token.
        """
        if self.card.decode is None:
            raise UnsupportedPattern(f"step: {self.card.id} cannot decode token by token. {self.card.why_not}".strip())
        cross = context is not None or getattr(cache, "cross", False)
        if cache is None:
            checked = self._checked(x, context, mask, True, None)
            return self._step(checked[0], None, context, checked[2])
        self._check_stream("x", x, self.dim)
        return self._step(x, cache, None, How(causal=True, cross=cross))

    def _checked(
        self, x: Tensor | None, context: Tensor | None, mask: Any, causal: bool, grid: Grid | None
    ) -> tuple[Any, Tensor, How]:
        how = How(None, causal, context is not None, grid)
        if how.pattern not in self.card.patterns:
            raise UnsupportedPattern(
                f"pattern: {self.card.id} has no {how.pattern} attention, expected one of "
                f"{', '.join(self.card.patterns)}. {self.card.why_not}".strip()
            )
        if x is not None:
            self._check_stream("x", x, self.dim)
        elif not (self.learned_queries and context is not None):
            raise CrosslightError("x: got None, expected a tensor (batch, n, dim)")
        if context is None:
            expect(
                self.context_dim == self.dim,
                "context",
                None,
                f"a tensor of width {self.context_dim}: this layer was built for cross-attention",
            )
            context = x
        else:
            self._check_stream("context", context, self.context_dim)
            if x is not None:
                expect(
                    context.shape[0] == x.shape[0], "context", f"batch {context.shape[0]}", f"batch {x.shape[0]} as x"
                )
        assert context is not None
        batch, m = context.shape[:2]
        n = m if x is None else x.shape[1]
        if grid is not None:
            size = 1
            for side in grid:
                size *= side
            expect(size == n, "grid", grid, f"sides whose product is the {n} tokens of x")
        checked = masks.as_mask(mask, batch=batch, heads=getattr(self, "heads", 1), n=n, m=m)
        if checked is not None and self.card.mask != "any":
            flag, _, rest = masks.split(checked)
            expect(
                self.card.mask == "keys" and rest is None and not flag,
                "mask",
                type(mask).__name__,
                f"a mask that {self.card.id} can take: "
                + ("key padding, bool (batch, m)" if self.card.mask == "keys" else "None"),
            )
        return x, context, How(checked, causal, how.cross, grid)

    def _check_stream(self, name: str, t: Tensor, width: int) -> None:
        if not isinstance(t, Tensor) or t.dim() != 3 or t.shape[2] != width or t.shape[1] == 0:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise CrosslightError(f"{name}: got {got}, expected (batch, length >= 1, {width})")
        weight = next(self.parameters(), None)
        if weight is not None and not torch.is_autocast_enabled(t.device.type):
            expect(t.dtype == weight.dtype, name, t.dtype, f"{weight.dtype}, the dtype of the layer")
            expect(t.device == weight.device, name, f"a tensor on {t.device}", f"one on {weight.device}")


class Core(nn.Module):
    """Attention between projected heads. Subclasses write `forward` and `weights`, and `step` where it is not that
    of cached keys and values."""

    card: ClassVar[Card]
    #: ``k`` and ``v`` may have fewer heads than ``q``; otherwise the layer repeats them.
    grouped: ClassVar[bool] = False
    #: `forward` and `weights` take ``bias=`` (a `Bias` or a tensor), added to the scores.
    takes_bias: ClassVar[bool] = False
    #: `forward` and `weights` take ``grid=``.
    takes_grid: ClassVar[bool] = False
    #: The layer that `build` puts around the core; `AttentionLayer` if None.
    layer: ClassVar[type[AttentionLayer] | None] = None
    #: The core needs more of its layer than queries, keys and values of one width, so no host can call it.
    needs_layer: ClassVar[bool] = False

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim

    def forward(self, q: Heads, k: Heads, v: Heads, *, mask: Mask | None = None, causal: bool = False) -> Heads:
        """(batch, heads, n, head_dim) x 3 -> (batch, heads, n, head_dim); causal: query i reads keys j <= i."""
        raise NotImplementedError

    def weights(self, q: Heads, k: Heads, *, mask: Mask | None = None, causal: bool = False) -> Weights:
        """The matrix whose product with v `forward` gives (plus what `read` adds)."""
        raise NotImplementedError

    def extra(self, how: How) -> dict[str, Any]:
        """What else `forward` and `weights` are told of a call, by the layer around the core or by a host: which
        queries are padding, say, or whether these are of another stream than the keys."""
        return {}

    def read(self, weights: Weights, v: Heads) -> Heads:
        """`forward`'s output if ``weights`` were the matrix; override where something is added beside it."""
        return weights @ dense.repeat_heads(v, weights.shape[1])

    def step(self, q: Heads, k: Heads, v: Heads, state: Any, **extra: Any) -> tuple[Heads, Any]:
        """Causal self-attention of the next token; ``state`` is None at the first one.

        The default keeps all keys and values. It is right for cores in which the last row of the causal matrix
        is the row of that query over all keys so far.
        """
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        return self(q, state.keys, state.values, **extra), state

    @classmethod
    def build(
        cls,
        dim: int,
        heads: int = 8,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
        **own: Any,
    ) -> AttentionLayer:
        """The layer around this core; ``own`` are the core's options. See `AttentionLayer`."""
        core = cls(heads, head_width(dim, heads, head_dim), **own)
        return (cls.layer or AttentionLayer)(
            core, dim, kv_heads=kv_heads, context_dim=context_dim, bias=bias, position=position
        )


@dataclass
class LayerCache:
    """What `AttentionLayer.step` carries: how many tokens were decoded and the core's state."""

    length: int
    state: Any
    cross: bool = False


class AttentionLayer(Mechanism):
    """Projections, a core, and the output projection: out(core(W_q x, W_k z, W_v z)).

    Args:
        core: the attention between heads.
        dim: width of x and of the output.
        kv_heads: key/value heads, each shared by a group of query heads; as many as heads unless given.
        context_dim: width of the context, dim unless given.
        bias: whether the four projections have biases.
        position: "rope", "rope2d", "alibi", "relative", or a `Rotation` or `Bias` of `engines.positions`.
    """

    def __init__(
        self,
        core: Core,
        dim: int,
        *,
        kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        position: str | nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        self.core, self.heads, self.head_dim = core, core.heads, core.head_dim
        self.kv_heads = self.heads if kv_heads is None else kv_heads
        expect(
            self.kv_heads > 0 and self.heads % self.kv_heads == 0,
            "kv_heads",
            self.kv_heads,
            f"a divisor of heads = {self.heads}",
        )
        self.q = nn.Linear(dim, self.heads * self.head_dim, bias)
        self.k = nn.Linear(self.context_dim, self.kv_heads * self.head_dim, bias)
        self.v = nn.Linear(self.context_dim, self.kv_heads * self.head_dim, bias)
        self.out = nn.Linear(self.heads * self.head_dim, dim, bias)
        self.position = positions.make(position, heads=self.heads, head_dim=self.head_dim)
        if isinstance(self.position, Bias) and not core.takes_bias:
            raise CrosslightError(
                f"position: {core.card.id} has no scores to add a bias to, expected a rotation such as 'rope'"
            )

    @property
    def card(self) -> Card:  # type: ignore[override]
        return self.core.card

    def _split(self, t: Tensor, heads: int) -> Heads:
        return t.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    # A mechanism that projects, or joins the heads, in another way overrides these.
    def _queries(self, x: Stream) -> Heads:
        return self._split(self.q(x), self.heads)

    def _keys(self, context: Context) -> Heads:
        return self._split(self.k(context), self.kv_heads)

    def _values(self, context: Context) -> Heads:
        return self._split(self.v(context), self.kv_heads)

    def _merge(self, y: Heads, x: Stream) -> Stream:
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Stream, context: Context, how: How, offset: int = 0) -> tuple[Heads, Heads, Heads]:
        q, k, v = self._queries(x), self._keys(context), self._values(context)
        if isinstance(self.position, Rotation):
            q = self.position.rotate(q, offset=offset, grid=how.grid)
            # A context has positions of its own, from 0 on.
            k = self.position.rotate(k, offset=0 if how.cross else offset, grid=None if how.cross else how.grid)
        if not self.core.grouped:
            k, v = dense.repeat_heads(k, self.heads), dense.repeat_heads(v, self.heads)
        return q, k, v

    def _extra(self, how: How) -> dict[str, Any]:
        extra = self.core.extra(how)
        if isinstance(self.position, Bias):
            extra["bias"] = self.position
        if self.core.takes_grid and how.grid is not None:
            extra["grid"] = how.grid
        return extra

    def _forward(self, x, context, how):
        q, k, v = self._heads(x, context, how)
        return self._merge(self.core(q, k, v, mask=how.mask, causal=how.triangular, **self._extra(how)), x)

    def _weights(self, x, context, how):
        q, k, _ = self._heads(x, context, how)
        return self.core.weights(q, k, mask=how.mask, causal=how.triangular, **self._extra(how))

    def _read(self, weights, x, context, how):
        v = self._values(context)
        if not self.core.grouped:
            v = dense.repeat_heads(v, self.heads)
        extra = {"grid": how.grid} if self.core.takes_grid and how.grid is not None else {}
        return self._merge(self.core.read(weights, v, **extra), x)

    def _step(self, x, cache, context, how):
        length = 0 if cache is None else cache.length
        extra = self._extra(how)
        if how.cross:
            if cache is None:
                q, k, v = self._heads(x, context, how)
                state = (k, v, how.mask)
            else:
                q, state = self._queries(x), cache.state
                if isinstance(self.position, Rotation):
                    q = self.position.rotate(q, offset=length)
            y = self.core(q, state[0], state[1], mask=state[2], **self._offset(extra, length))
        else:
            q, k, v = self._heads(x, x, how, offset=length)
            y, state = self.core.step(q, k, v, None if cache is None else cache.state, **self._offset(extra, length))
        return self._merge(y, x), LayerCache(length + x.shape[1], state, how.cross)

    def _offset(self, extra: dict[str, Any], length: int) -> dict[str, Any]:
        return extra | ({"offset": length} if "bias" in extra else {})
