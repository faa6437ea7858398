"""What hosts share: sites, calls, rules, and the seat through which every attention call passes.

A **site** is one attention module of a model, whatever library it comes from. A **seat** is what Crosslight has
attached to a site: rules, watchers and at most one core in the place of the host's attention. Each library has an
adapter with two functions: ``claim(module, name, parents)`` says whether a module is a site, and ``attach(site)``
leads its attention calls through the seat, until the undo that it returns is called.

Everything is bound to instances and found again through ``module``, never through a closure over it, so that a deep
copy of a swapped model is a swapped model of its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslight.attention.base import Core, How
from crosslight.engines import dense, masks
from crosslight.errors import CrosslightError, UnsupportedPattern, expect

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Heads = Float[Tensor, "batch heads length head_dim"]
    Weights = Float[Tensor, "batch heads n m"]

SEAT = "_crosslight"
#: Name under which a core is registered on the host's module.
CORE = "crosslight_core"

Undo = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module of a model.

    Attributes:
        name: its path in the model.
        module: the module.
        stream: whether it reads its own stream, another one, or both in one sequence ("joint"). Where the module
            does both, as its callers please, this is a guess from its path; `Call.context` is what happened.
        heads: number of query heads.
        head_dim: their width.
        host: the adapter's name.
        parents: the modules around it, outermost first.
    """

    name: str
    module: nn.Module = field(repr=False)
    stream: Literal["self", "cross", "joint"]
    heads: int
    head_dim: int
    host: str
    parents: tuple[nn.Module, ...] = field(repr=False, default=())


@dataclass(frozen=True, eq=False)
class Call:
    """What a rule sees beside the matrix.

    Attributes:
        site: where.
        hidden: input x of the attention module, (batch, n, dim).
        context: the stream that is read, (batch, m, context_dim), or None in self-attention.
        residual: input of the module around the site: in pre-norm networks the residual stream before its norm.
        q, k, v: projected heads, (batch, heads, length, head_dim), where the host has them.
    """

    site: Site
    hidden: Float[Tensor, "batch n dim"] | None = None
    context: Float[Tensor, "batch m context_dim"] | None = None
    residual: Float[Tensor, "batch n dim"] | None = None
    q: Heads | None = None
    k: Heads | None = None
    v: Heads | None = None


#: Gets the attention matrix after its softmax, (batch, heads, n, m), and returns the matrix to use. A rule may have a
#: ``strength``; at 0 it is not asked at all.
Rule = Callable[[Tensor, Call], Tensor]
Where = str | Callable[[Site], bool] | None


@dataclass(eq=False)
class Entry:
    """A rule or a watcher at a site."""

    what: Callable[[Tensor, Call], Tensor]
    site: Site
    watches: bool = False

    @property
    def active(self) -> bool:
        return not self.watches and getattr(self.what, "strength", 1) != 0


#: What hosts call the stream that is read.
_CONTEXT = ("key_value_states", "encoder_hidden_states", "context", "encoder_states", "kv_states", "memory")


def _nothing() -> None:
    pass


class Seat:
    """What is attached to one module. Every attention call of the module passes through `attend` or `pass_`."""

    def __init__(self, parameters: tuple[str, ...] = ()) -> None:
        self.parameters = parameters  # of the module's forward
        self.entries: list[Entry] = []
        self.swaps = 0
        self.undo: Undo = _nothing
        self.host: str | None = None  # the host's own choice of attention, while ours is in its place
        self.hidden: Tensor | None = None
        self.context: Tensor | None = None
        self.residual: Tensor | None = None
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        """A copied model keeps the swapped core; rules and watchers stay with the model they were entered for."""
        twin = Seat(self.parameters)
        twin.swaps = self.swaps
        return twin

    @property
    def free(self) -> bool:
        return not self.entries and not self.swaps

    @property
    def idle(self) -> bool:
        """Nothing to do: the host runs as if nobody were here."""
        return not self.swaps and not any(e.watches or e.active for e in self.entries)

    def streams(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """(hidden, context) among the arguments of the module's forward."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        hidden = next((a for a in given.values() if isinstance(a, Tensor)), None)
        return hidden, next((given[n] for n in _CONTEXT if isinstance(given.get(n), Tensor)), None)

    @contextmanager
    def layer(self, hidden: Tensor | None, context: Tensor | None) -> Iterator[None]:
        """The layer's input, for the calls inside the block."""
        self.hidden, self.context, self.calls = hidden, context if context is not hidden else None, 0
        try:
            yield
        finally:
            self.hidden = self.context = None

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module around the site."""
        given = [*args, *kwargs.values()]
        self.residual = next((a for a in given if isinstance(a, Tensor) and a.is_floating_point()), None)

    def pass_(
        self,
        *,
        weights: Callable[[], Tensor],
        read: Callable[[Tensor], Tensor],
        plain: Callable[[], Any],
        wanted: bool = False,
        linear: bool = True,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
    ) -> tuple[Any, Tensor | None]:
        """One attention call: its output, and its matrix where one was formed.

        Args:
            weights: forms the matrix.
            read: the output for a given matrix.
            plain: the output by the fast way.
            wanted: the caller needs the matrix.
            linear: whether ``read`` of the matrix is the output; if not, the call can be watched but not steered.
        """
        self.calls += 1
        rules = [e for e in self.entries if e.active]
        watchers = [e for e in self.entries if e.watches]
        if not rules and not watchers and not wanted:
            return plain(), None
        a = weights()
        call = Call(None, self.hidden, self.context, self.residual, q, k, v)  # type: ignore[arg-type]
        for entry in rules:
            shape = a.shape
            a = entry.what(a, replace(call, site=entry.site))
            expect(
                isinstance(a, Tensor) and a.shape == shape,
                "rule",
                f"{tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__} from it at {entry.site.name}",
                f"a matrix {tuple(shape)} as it was given",
            )
        for entry in watchers:
            a = entry.what(a, replace(call, site=entry.site))
        if not linear:
            if rules:
                raise CrosslightError(
                    f"rule: got one at {rules[0].site.name}, whose attention is not linear in its values and so has "
                    "no matrix to change, expected another site"
                )
            return plain(), a
        return read(a), a


def seat(module: nn.Module) -> Seat:
    return module.__dict__[SEAT]


def attend(
    module: nn.Module,
    q: Heads,
    k: Heads,
    v: Heads,
    *,
    scale: float | None = None,
    keep: Bool[Tensor, "#batch #heads n m"] | None = None,
    bias: Float[Tensor, "#batch #heads n m"] | None = None,
    causal: bool = False,
    offset: int = 0,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    wanted: bool = False,
    caches: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The attention call of a host whose heads are at hand.

    Args:
        module: the site's module.
        q, k, v: (batch, heads, n, d), (batch, kv_heads, m, d), (batch, kv_heads, m, value_dim).
        keep, bias: True = may be read; added to the scores.
        causal: query i, at position offset + i, reads keys j <= offset + i.
        dropout: probability, already 0 outside training.
        softcap, sinks: tanh cap of the scores and a learned score per head that no key has (Gemma 2, gpt-oss).
        caches: keys before those of the layer's own input are of a cache of earlier tokens.
        window: how many tokens such a cache holds at most.

    Returns:
        The output, (batch, heads, n, value_dim), and the matrix where one was formed.
    """
    here = seat(module)
    core: Core | None = getattr(module, CORE, None)
    if core is None:

        def weights() -> Tensor:
            return _softmax(q, k, scale, keep, bias, causal, offset, softcap, sinks)

        def read(a: Tensor) -> Tensor:
            return (F.dropout(a, dropout) if dropout else a) @ dense.repeat_heads(v, q.shape[1])

        return here.pass_(weights=weights, read=read, plain=lambda: read(weights()), wanted=wanted, q=q, k=k, v=v)
    expect(
        softcap is None and sinks is None,
        "swap",
        "a host with capped or sink scores",
        f"one whose scores are plain: {core.card.id} has none to cap",
    )
    if scale is not None and not math.isclose(scale, q.shape[-1] ** -0.5):
        q = q * (scale * q.shape[-1] ** 0.5)
    if not core.grouped:
        k, v = dense.repeat_heads(k, q.shape[1]), dense.repeat_heads(v, q.shape[1])
    n, m = q.shape[2], k.shape[2]
    # Keys beyond those of the layer's own input; or none yet, and one token.
    own = here.context is None and here.hidden is not None and here.hidden.shape[1] == n
    cached = caches and own and (n < m or n == 1)
    if cached and not torch.compiler.is_compiling():
        if causal:
            triangle = masks.causal().dense(1, 1, n, m, device=q.device, offset=offset)
            keep, causal = triangle if keep is None else keep & triangle, False
        m = max(n, _filled(keep, bias, m))  # a cache of fixed size is empty after the last query
        k, v = k[:, :, :m], v[:, :, :m]
        keep, bias = (t if t is None else t[..., :m] for t in (keep, bias))
    how, before = _for_core(core, q, k, keep, bias, causal, offset, here.context is not None, cached)
    expect(
        not before or window is None or m < window,
        "swap",
        f"cached keys for {core.card.id} from a cache that drops those before its window of {window}",
        "use_cache=False",
    )

    def rows(call: Callable[[Tensor], Tensor]) -> Tensor:
        return _continued(core, call, q, before, (q, k, v)) if before else call(q)

    return here.pass_(
        weights=lambda: rows(lambda q: core.weights(q, k, **how)),
        read=lambda a: core.read(F.pad(a, (0, 0, before, 0)) if before else a, v)[:, :, before:],
        plain=lambda: rows(lambda q: core(q, k, v, **how)),
        wanted=wanted,
        linear=core.card.linear_in_values,
        q=q,
        k=k,
        v=v,
    )


def _softmax(q, k, scale, keep, bias, causal, offset, softcap, sinks):
    s = dense.scores(q, k, scale=scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if causal:
        triangle = masks.causal().dense(1, 1, s.shape[2], s.shape[3], device=s.device, offset=offset)
        keep = triangle if keep is None else keep & triangle
    # As hosts do: the softmax of half precision scores in float32.
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    if sinks is not None:
        wide = torch.cat([wide, sinks.to(wide.dtype).view(1, -1, 1, 1).expand(*wide.shape[:3], 1)], -1)
        keep = None if keep is None else F.pad(keep, (0, 1), value=True)
        return dense.softmax(wide, keep)[..., :-1].to(s.dtype)
    return dense.softmax(wide, keep).to(s.dtype)


def _filled(keep: Tensor | None, bias: Tensor | None, m: int) -> int:
    """How many of m keys there are up to the last that is read."""
    for rule in (keep, None if bias is None else _shown(bias)):
        if rule is not None and rule.any():
            m = min(m, int(rule.flatten(0, -2).any(0).nonzero().max()) + 1)
    return m


def _shown(bias: Tensor) -> Tensor:
    """Additive masks hold a huge negative number where nothing may be read."""
    return bias > torch.finfo(bias.dtype).min / 4


def _continued(
    core: Core, call: Callable[[Tensor], Tensor], q: Heads, before: int, given: tuple[Tensor, ...]
) -> Tensor:
    """The last rows of a call over the whole sequence, for a core that one row of keys would not tell its place.

    The ``before`` earlier queries are in no cache. They are NaN here, so that a core whose later rows depend on them
    is found out.
    """
    training = core.training
    core.eval()  # running statistics are of whole sequences
    try:
        with torch.no_grad():
            y = call(F.pad(q, (0, 0, before, 0), value=math.nan))[:, :, before:]
        expect(
            not y.isnan().any() or any(bool(t.isnan().any()) for t in given),
            "swap",
            f"cached keys for {core.card.id}, which needs the earlier queries as well",
            "use_cache=False",
        )
        return call(F.pad(q, (0, 0, before, 0)))[:, :, before:] if torch.is_grad_enabled() else y
    finally:
        core.train(training)


def _for_core(core, q, k, keep, bias, causal, offset, cross, cached):
    """What the host says about who may read whom, in the words of a core, and the number of earlier queries that have
    to be put before those of the call."""
    n, m, before = q.shape[2], k.shape[2], 0
    if bias is not None:
        shown = _shown(bias)
        keep = shown if keep is None else keep & shown
        bias = bias.masked_fill(~shown, 0)
        if torch.compiler.is_compiling():
            bias = bias if core.takes_bias else None
        elif not bias.any():
            bias = None
        expect(
            bias is None or core.takes_bias,
            "swap",
            "a host that adds position biases to its scores",
            f"a mechanism that takes them: {core.card.id} does not",
        )
    mask: masks.Mask | None = None
    if keep is not None and not causal and not torch.compiler.is_compiling():
        causal, mask = structure(keep, n, m, cached)
        offset = m - n
    elif keep is not None:
        mask = masks.Pairs(keep.expand(keep.shape[0], keep.shape[1], n, m))
    if cached and n == 1 and not causal:
        causal, offset = True, m - 1
    # By the default step of a core, one row is that of its query over all keys so far.
    alone = type(core).step is Core.step and (n == 1 or core.card.mask == "any")
    if cached and n < m and (causal or mask is not None) and not alone:
        compiling = torch.compiler.is_compiling()
        expect(not compiling, "swap", f"cached keys for {core.card.id} in a compiled model", "use_cache=False")
        before = m - n
        if isinstance(mask, masks.Pairs):
            earlier = masks.causal().dense(1, 1, before, m, device=q.device)
            mask = masks.Pairs(torch.cat([earlier.expand(*mask.keep.shape[:2], -1, -1), mask.keep], 2))
        bias = None if bias is None else F.pad(bias, (0, 0, before, 0))
        n = m
    if causal and n == 1 and offset + 1 >= m and (n < m or "causal-self" not in core.card.patterns):
        causal = False
    elif causal and n != m:
        triangle = masks.causal().dense(1, 1, n, m, device=q.device, offset=offset)
        causal, mask = False, masks.join(mask, masks.Pairs(triangle))
    call = How(mask, causal, cross)
    # The last query of a causal sequence reads like one of a context.
    if not (n == 1 and not causal) and call.pattern not in core.card.patterns:
        raise UnsupportedPattern(
            f"swap: {core.card.id} has no {call.pattern} attention, which the host asks for; it has "
            f"{', '.join(core.card.patterns)}. {core.card.why_not}".strip()
        )
    rest = masks.split(mask)[2]
    if core.card.mask == "none" or (core.card.mask == "keys" and rest is not None):
        expect(
            mask is None,
            "swap",
            f"a host call with a mask that {core.card.id} cannot take",
            "key padding only" if core.card.mask == "keys" else "no mask",
        )
    # Of queries that are fewer than the keys, as in decoding, a mask of keys says nothing.
    how = {"mask": mask, "causal": causal, **core.extra(call if n == m else replace(call, cross=True))}
    return (how if bias is None else how | {"bias": bias}), before


def structure(keep: Tensor, n: int, m: int, cached: bool = False) -> tuple[bool, masks.Mask | None]:
    """A boolean matrix as causal flag, key padding or, failing that, pairs: many mechanisms take only the first two.
    Of a ``cached`` call, the last query is aligned with the last key."""
    keep = keep.expand(keep.shape[0], keep.shape[1], n, m)
    if keep.all():
        return False, None
    if keep.shape[1] == 1:
        last = keep[:, :, -1:]
        padding = None if last.all() else masks.keys(last[:, 0, 0])
        if torch.equal(keep, last.expand_as(keep)):
            return False, padding
        if (n == m or cached) and torch.equal(keep, last & torch.ones_like(keep).tril(m - n)):
            return True, padding
    return False, masks.Pairs(keep)


# Binding ------------------------------------------------------------------------------------------------------------
def bind(module: nn.Module, name: str, function: Callable[..., Any]) -> Undo:
    """Put ``function(module, inner, *args, **kwargs)`` in the place of a method of this instance."""
    before = module.__dict__.get(name)
    of_class = getattr(type(module), name)

    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return of_class(self, *args, **kwargs) if before is None else before(*args, **kwargs)

        return function(self, inner, *args, **kwargs)

    module.__dict__[name] = MethodType(bound, module)

    def undo() -> None:
        if before is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before

    return undo


@lru_cache(None)
def parameters_of(cls: Any) -> tuple[str, ...]:
    """Names of the positional parameters of a class' forward."""
    forward = inspect.signature(inspect.unwrap(cls.forward))
    return tuple(n for n, p in forward.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


@lru_cache(None)
def names_in(cls: Any, method: str | None = "forward") -> frozenset[str]:
    """Global and attribute names that the code of a class' method uses; of all its own methods if None."""
    methods = [getattr(cls, method, None)] if method else list(vars(cls).values())
    found: set[str] = set()
    for m in methods:
        code = getattr(inspect.unwrap(m), "__code__", None) if callable(m) else None
        found.update(code.co_names if code else ())
    return frozenset(found)


def number(module: nn.Module, names: Sequence[str]) -> int | None:
    """The first of the attributes, of the module or its config, that is a positive int."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads_per_partition")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size", "d_head")
WIDTH = ("embed_dim", "all_head_size", "inner_dim", "hidden_size", "d_model", "dim", "n_embd", "embed_size")


def site(
    host: str, module: nn.Module, name: str, parents: tuple[nn.Module, ...], heads: int, head_dim: int, stream: str = ""
) -> Site:
    """A site; its stream, unless given, is read from the paths and classes of the module and the one around it."""
    if not stream:
        words = ".".join([*name.split(".")[-2:], *(type(m).__name__ for m in (module, *parents[-1:]))]).lower()
        crosses = any(word in words for word in ("cross", "encoder_attn", "encdec", "enc_dec", "encoder_attention"))
        stream = "cross" if crosses else "self"
    return Site(name, module, cast(Any, stream), heads, head_dim, host, parents)
