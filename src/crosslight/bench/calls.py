"""What is measured: a system by id, or a baseline, called on random input of a given length."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from crosslight import registry, tasks
from crosslight.bench.baselines import BASELINES, Layer
from crosslight.cards import PATTERNS, Card
from crosslight.engines import masks
from crosslight.engines.masks import Mask
from crosslight.errors import CrosslightError, expect
from crosslight.tasks.base import Entrant

Call = Callable[[], Any]
Level = Literal["layer", "core"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Unsupported(CrosslightError):
    """An entrant has no form for the setting; a sweep records that and goes on with the others."""


@dataclass(frozen=True)
class Setting:
    """What all entrants of a table share.

    Attributes:
        pattern: one of the four attention patterns; in the cross ones the context is as long as x.
        mask: a rule such as ``window:256``, ``window:256 | sink:4``, or empty.
        backward: whether a call is forward + backward, with gradients of input and parameters.
        level: "layer", projections included, or "core", between projected heads.
    """

    pattern: str = "noncausal-self"
    dim: int = 512
    heads: int = 8
    batch: int = 1
    mask: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = True
    level: Level = "layer"

    def __post_init__(self) -> None:
        expect(self.pattern in PATTERNS, "pattern", repr(self.pattern), f"one of {', '.join(PATTERNS)}")
        expect(self.dtype in DTYPES, "dtype", repr(self.dtype), f"one of {', '.join(DTYPES)}")
        expect(self.level in get_args(Level), "level", repr(self.level), f"one of {', '.join(get_args(Level))}")
        for name in ("dim", "heads", "batch"):
            expect(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        expect(self.dim % self.heads == 0, "dim", self.dim, f"a multiple of heads = {self.heads}")
        parse_mask(self.mask)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).partition("\n")[0]
            raise CrosslightError(f"device: got {self.device!r}, expected one that torch has ({first})") from error

    @property
    def causal(self) -> bool:
        return self.pattern.startswith("causal")

    @property
    def cross(self) -> bool:
        return self.pattern.endswith("cross")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def factory(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": DTYPES[self.dtype]}


_RULES: dict[str, Callable[..., Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "dilated": masks.dilated,
    "sink": masks.sink,
}


def parse_mask(text: str) -> Mask | None:
    """``window:256``, ``causal & window(128) | sink:4``, ``~window:3``; None if empty."""
    if not text.strip():
        return None
    expected = f"{', '.join(_RULES)} with a number, combined with & | ~, such as 'window:256 | sink:4'"
    try:
        return _rule(ast.parse(re.sub(r"(\w+):(\d+)", r"\1(\2)", text), mode="eval").body)
    except (SyntaxError, TypeError, KeyError):
        raise CrosslightError(f"mask: got {text!r}, expected {expected}") from None


def _rule(node: ast.AST) -> Mask:
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _rule(left) & _rule(right)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _rule(left) | _rule(right)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_rule(operand)
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=int() as number)]):
            return _RULES[name](number)
        case ast.Name(id=name):
            return _RULES[name]()
    raise TypeError


def _support(holds: bool, message: str) -> None:
    if not holds:
        raise Unsupported(message)


class Prepared:
    """An entrant built for a setting, from which calls of any length are made."""

    def __init__(self, entrant: Entrant, setting: Setting) -> None:
        self.entrant, self.setting = entrant, setting
        self.mask = parse_mask(setting.mask)
        if entrant.id in BASELINES:
            expect(not entrant.options, f"options of {entrant.id!r}", ", ".join(entrant.options), "none")
            on_cpu = torch.device(setting.device).type == "cpu"
            _support(not (entrant.id == "flex" and setting.backward and on_cpu), "backward: flex has none on a CPU")
            self._make = _token(entrant, setting, self.mask)
            return
        card: Card = registry.factory(entrant.id)[0].card  # type: ignore[attr-defined]
        expect(card.kind in _MAKERS, "id", f"{entrant.id!r}, kind {card.kind}", f"one of kind {', '.join(_MAKERS)}")
        if card.kind == "token":
            has = f"pattern: {entrant.id} has no {setting.pattern} attention. {card.why_not}".strip()
            _support(setting.pattern in card.patterns, has)
        else:
            _support(self.mask is None, f"mask: {entrant.id}, kind {card.kind}, takes none")
        self._make = _MAKERS[card.kind](entrant, setting, self.mask)

    def call(self, n: int) -> Call:
        """A call on ``n`` tokens; it returns what it computed, gradients where the setting asks for them."""
        return self._make(n)


def _inputs(setting: Setting, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(setting.device).manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator, **setting.factory).requires_grad_(setting.backward) for shape in shapes
    )


def _run(forward: Callable[[], Any], wanted: list[Tensor], backward: bool) -> Call:
    """Forward without gradients, or forward and the gradients of ``wanted``."""
    if not backward:

        def call() -> Any:
            with torch.no_grad():
                return forward()

        return call

    def both() -> Any:
        outputs = forward()
        parts = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
        parts = [p for p in parts if p.requires_grad]
        return torch.autograd.grad(parts, wanted, [torch.ones_like(p) for p in parts], allow_unused=True)

    return both


#: What rows need whose defaults do not fit 512 channels and 8 heads.
_FITTING: dict[str, dict[str, Any]] = {"kmax-deeplab": {"heads": 1}, "get-event-transformer": {"groups": 8}}


def fitting(id: str, n: int) -> Entrant:
    """A row at the width of the project's figures, with room for ``n`` tokens where its default has a learned place
    a token or a segment of 128."""
    known = registry.options(registry.factory(id)[0])
    room = {name: size for name, size in (("max_length", n), ("segments", -(-n // 128))) if name in known}
    return Entrant(id, {**room, **_FITTING.get(id, {})})


def home(card: Card) -> str:
    """The pattern in which a row is measured: cross where its queries are learned, else that of its evidence's task,
    else the first of causal-self, noncausal-self and the cross ones."""
    if getattr(registry.factory(card.id)[0], "learned_queries", False):
        return "noncausal-cross"
    shown = tasks.find(card.evidence.task.partition(",")[0]).pattern if card.evidence else None
    order = ("causal-self", "noncausal-self", "noncausal-cross", "causal-cross")
    return shown if shown in card.patterns else next(p for p in order if p in card.patterns)


def built(entrant: Entrant, setting: Setting, **sizes: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.create(entrant.id, **{**sizes, **entrant.options}).to(**setting.factory)


def _token(entrant: Entrant, setting: Setting, mask: Mask | None) -> Callable[[int], Call]:
    if setting.level == "core":
        return _core(entrant, setting, mask)
    module = (
        Layer(BASELINES[entrant.id], setting.dim, setting.heads).to(**setting.factory)
        if entrant.id in BASELINES
        else built(entrant, setting, dim=setting.dim, heads=setting.heads)
    )

    def make(n: int) -> Call:
        x, z = _inputs(setting, *[(setting.batch, n, setting.dim)] * 2)
        # Learned queries (slots, latents) are few; what grows is the context.
        learned = setting.cross and getattr(module, "learned_queries", False)
        streams = [None, z] if learned else [x, z] if setting.cross else [x]
        return _run(
            lambda: module(*streams, mask=mask, causal=setting.causal),
            [s for s in streams if s is not None] + [p for p in module.parameters() if p.requires_grad],
            setting.backward,
        )

    return make


def _core(entrant: Entrant, setting: Setting, mask: Mask | None) -> Callable[[int], Call]:
    causal = setting.causal and not setting.cross
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    if entrant.id in BASELINES:
        baseline, parameters = BASELINES[entrant.id], []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return baseline(q, k, v, mask, causal)

    else:
        layer = built(entrant, setting, dim=setting.dim, heads=setting.heads)
        core = getattr(layer, "core", None)
        if core is None:
            raise Unsupported(f"level: {entrant.id} is a layer, with no core between heads")
        _support(not core.needs_layer, f"level: the core of {entrant.id} reads more than queries, keys and values")
        parameters = [p for p in core.parameters() if p.requires_grad]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return core(q, k, v, mask=mask, causal=causal)

    def make(n: int) -> Call:
        shape = (setting.batch, setting.heads, n, setting.dim // setting.heads)
        q, k, v = _inputs(setting, shape, shape, shape)
        return _run(lambda: attend(q, k, v), [q, k, v, *parameters], setting.backward)

    return make


def _map(entrant: Entrant, setting: Setting, mask: Mask | None) -> Callable[[int], Call]:
    module = built(entrant, setting, channels=setting.dim)

    def make(n: int) -> Call:
        side = round(n**0.5)
        (x,) = _inputs(setting, (setting.batch, setting.dim, side, -(-n // side)))
        return _run(lambda: module(x), [x, *module.parameters()], setting.backward)

    return make


def _fusion(entrant: Entrant, setting: Setting, mask: Mask | None) -> Callable[[int], Call]:
    widths = {"a": setting.dim, "b": setting.dim}
    sizes = {"streams": widths, "heads": setting.heads}
    known = registry.options(registry.factory(entrant.id)[0])
    module = built(entrant, setting, **{name: size for name, size in sizes.items() if name in known})

    def make(n: int) -> Call:
        streams = dict(zip(widths, _inputs(setting, *[(setting.batch, n, setting.dim)] * 2), strict=True))
        return _run(lambda: module(streams), [*streams.values(), *module.parameters()], setting.backward)

    return make


_MAKERS: dict[str, Callable[[Entrant, Setting, Mask | None], Callable[[int], Call]]] = {
    "token": _token,
    "map": _map,
    "fusion": _fusion,
}
