"""The checks of kind token: attention layers, (batch, n, dim) reads (batch, m, context_dim) -> (batch, n, dim)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosslight.attention.base import AttentionLayer, Core, How, Mechanism
from crosslight.cards import PATTERNS, Card
from crosslight.engines import masks
from crosslight.engines.backend import Backend, backend
from crosslight.errors import CrosslightError, UnsupportedPattern
from crosslight.testing import flops
from crosslight.testing.common import EXACT, close, differentiable, gradients, published_sizes, refused, restored, twice
from crosslight.testing.suite import Make, Skip, declare

FAST_AND_SLOW: tuple[Backend, Backend] = ("auto", "reference")


@dataclass(frozen=True)
class Call:
    """The input of one call, in one pattern."""

    x: Tensor
    context: Tensor | None
    causal: bool

    def __call__(self, attn: Mechanism, mask: Any = None) -> Tensor:
        return attn(self.x, self.context, mask=mask, causal=self.causal)

    def weights(self, attn: Mechanism, mask: Any = None) -> Tensor:
        return attn.weights(self.x, self.context, mask=mask, causal=self.causal)

    def read(self, attn: Mechanism, weights: Tensor, mask: Any = None) -> Tensor:
        return attn.read(weights, self.x, self.context, mask=mask, causal=self.causal)

    @property
    def source(self) -> Tensor:
        """The stream that is read."""
        return self.x if self.context is None else self.context

    def on(self, source: Tensor) -> Call:
        """The same call, reading another stream."""
        if self.context is None:
            return dataclasses.replace(self, x=source)
        return dataclasses.replace(self, context=source)


def inputs(attn: Mechanism, pattern: str, n: int = 9, m: int = 6, batch: int = 2) -> Call:
    """Random input in the layer's dtype, that asks for gradients."""
    dtype = next((p.dtype for p in attn.parameters()), torch.float64)
    x = torch.randn(batch, n, attn.dim, dtype=dtype, requires_grad=True)
    context = torch.randn(batch, m, attn.context_dim, dtype=dtype, requires_grad=True)
    return Call(x, context if pattern.endswith("cross") else None, pattern.startswith("causal"))


def long(attn: Mechanism, pattern: str, length: int) -> Call:
    """One long example: n = m = length, or few learned queries that read ``length`` tokens."""
    return inputs(attn, pattern, 4 if getattr(attn, "learned_queries", False) else length, length, batch=1)


def padding(call: Call, *kept: int) -> Tensor:
    """Key padding that keeps the first ``kept[b]`` keys of batch element b."""
    return torch.arange(call.source.shape[1]) < torch.tensor(kept).view(-1, 1)


def tensors(cache: Any) -> Iterator[Tensor]:
    """Every tensor inside a decoding cache."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, dict):
        for part in cache.values():
            yield from tensors(part)
    elif isinstance(cache, list | tuple):
        for part in cache:
            yield from tensors(part)
    elif hasattr(cache, "__dict__"):
        yield from tensors(vars(cache))


@declare("token")
def shapes_at_any_length(make: Make, card: Card, pattern: str) -> None:
    """The output has the shape of x at any length, one token and no multiple of a block among them.

    Where queries are learned, x may be None, and the output has as many tokens as there are queries.
    """
    attn = make()
    for n, m in ((1, 1), (2, 7), (7, 2), (33, 1), (1, 33), (33, 19)):
        call = inputs(attn, pattern, n, m)
        y = call(attn)
        assert y.shape == call.x.shape, f"output {tuple(y.shape)} for x {tuple(call.x.shape)}"
        assert y.isfinite().all(), f"output is not finite at length {n}"
        shape = tuple(call.weights(attn).shape)
        heads = getattr(attn, "heads", 1)
        expected = (2, heads, n, call.source.shape[1])
        # A head of several matrices (two triangles, say) shows them all.
        matrices = shape[1] if len(shape) == 4 and shape[1] and shape[1] % heads == 0 else heads
        held = shape == (2, matrices, n, call.source.shape[1])
        assert held, f"weights {shape}, expected (batch, heads, n, m) = {expected}"
    if getattr(attn, "learned_queries", False) and pattern.endswith("cross"):
        call = inputs(attn, pattern)
        y = attn(None, call.context, causal=call.causal)
        assert y.shape == (2, y.shape[1], attn.dim), (
            f"output {tuple(y.shape)} for x None, expected (batch, queries, dim)"
        )
        assert y.isfinite().all(), "output is not finite for x None"


@declare("token", when=lambda card: any(p.endswith("cross") for p in card.patterns))
def context_has_its_own_width(make: Make, card: Card, pattern: str) -> None:
    """A layer built with ``context_dim`` reads a context of that width, and says so when self-attention is asked."""
    attn = make(context_dim=12)
    if pattern.endswith("cross"):
        call = inputs(attn, pattern)
        assert call(attn).shape == call.x.shape, "output has another shape than x"
    else:
        with refused("context"):
            inputs(attn, pattern)(attn)


@declare("token", when=lambda card: card.linear_in_values)
def fast_path_equals_weights(make: Make, card: Card, pattern: str) -> None:
    """The output is what `weights` applied to the values gives, with and without key padding."""
    attn = make()
    for n, m in ((9, 6), (33, 29)):
        call = inputs(attn, pattern, n, m)
        close(call.read(attn, call.weights(attn)), call(attn), f"read(weights) at n={n}")
        if card.mask != "none":
            mask = padding(call, m, m // 2)
            close(call.read(attn, call.weights(attn, mask), mask), call(attn, mask), f"read(weights) masked at n={n}")


@declare("token")
def backends_agree(make: Make, card: Card, pattern: str) -> None:
    """The fast path computes what ``backend("reference")`` does, in values and gradients."""
    attn = make()
    call = inputs(attn, pattern, 33, 29)
    for mask in (None,) if card.mask == "none" else (None, padding(call, call.source.shape[1], 11)):
        results = []
        for name in FAST_AND_SLOW:
            with backend(name), torch.random.fork_rng(devices=[]):
                y = call(attn, mask)
                results.append((y, gradients(y, call.x, call.source)))
        close(results[0][0], results[1][0], "output")
        for fast, slow in zip(results[0][1], results[1][1], strict=True):
            close(fast, slow, "gradient")


@declare("token", when=lambda card: any(p.startswith("causal") for p in card.patterns))
def causal_does_not_leak(make: Make, card: Card, pattern: str) -> None:
    """Output i depends on x up to i only: later gradients are zero, and changed later tokens change nothing."""
    if not pattern.startswith("causal"):
        raise Skip("not a causal pattern")
    attn = make()
    call = inputs(attn, pattern, 19, 11)
    y = call(attn)
    for i in (0, 1, 6, 11, 17):
        leak = gradients(y[:, i], call.x)[0][:, i + 1 :].abs().max().item()
        assert leak <= EXACT, f"gradient of output {i} on later tokens is {leak:.1e}"
        # Decisions (routing, hashing) have no gradient, so a change must show too.
        changed = torch.cat([call.x[:, : i + 1], 3 * torch.randn_like(call.x[:, i + 1 :])], 1)
        close(dataclasses.replace(call, x=changed)(attn)[:, : i + 1], y[:, : i + 1], f"outputs to {i}, later x changed")
    if card.linear_in_values and call.context is None:
        above = call.weights(attn).triu(1).abs().max().item()
        assert above <= EXACT, f"weights above the diagonal are {above:.1e}"


@declare("token", when=lambda card: "causal-cross" in card.patterns)
def causal_cross_sees_all_context(make: Make, card: Card) -> None:
    """In causal cross-attention the first query already reads context tokens beyond its own index."""
    attn = make()
    call = inputs(attn, "causal-cross", 9, 12)
    seen = gradients(call(attn)[:, 0], call.source)[0][:, 1:].abs().max().item()
    assert seen > 0, "output 0 does not depend on the context after its first token"


@declare("token", when=lambda card: card.mask != "none")
def masked_keys_have_no_influence(make: Make, card: Card, pattern: str) -> None:
    """A key that may not be read has zero gradient and zero weight, and changing it changes nothing."""
    attn = make()
    call = inputs(attn, pattern, 19, 19)
    mask = padding(call, 19, 7)
    mask[0, 3] = False
    masked = ~mask.unsqueeze(-1)
    # A masked token of x still asks: only its own output may depend on it.
    kept = masked.expand_as(call.x).logical_not() if call.context is None else torch.ones_like(call.x, dtype=torch.bool)
    y = call(attn, mask)[kept]
    influence = (gradients(y, call.source)[0] * masked).abs().max().item()
    assert influence <= EXACT, f"gradient on masked keys is {influence:.1e}"
    changed = torch.where(masked, 10 * torch.randn_like(call.source), call.source)
    close(call.on(changed)(attn, mask)[kept], y, "output with masked keys changed")
    if card.linear_in_values:
        weight = call.weights(attn, mask).masked_fill(mask[:, None, None], 0).abs().max().item()
        assert weight <= EXACT, f"weights on masked keys are {weight:.1e}"


@declare("token", when=lambda card: card.mask != "none")
def training_leaves_out_padding(make: Make, card: Card, pattern: str) -> None:
    """In training mode, too, a masked key changes nothing: neither what is read nor what buffers count."""
    call = inputs(make(), pattern, 19, 19)
    mask = padding(call, 19, 7)
    mask[0, 3] = False
    changed = torch.where(mask.unsqueeze(-1), call.source, 10 * torch.randn_like(call.source))
    seen = []
    for each in (call, call.on(changed)):
        attn = make().train()
        torch.manual_seed(0)  # both drop the same
        y = each(attn, mask)
        seen.append({"the output": y[mask] if call.context is None else y, **dict(attn.named_buffers())})
    for name, expected in seen[0].items():
        close(seen[1][name], expected, f"{name} with masked keys changed")


@declare("token", when=lambda card: card.mask != "none")
def core_is_told_of_padding(make: Make, card: Card, pattern: str) -> None:
    """Also where a host calls the core, with its own heads and what `extra` says, a masked token of x changes no output
    but its own."""
    attn = make()
    if not (isinstance(attn, AttentionLayer) and issubclass(make.cls, Core)):
        raise Skip("no core that a host could call")
    if pattern.endswith("cross"):
        raise Skip("queries of another stream than the keys")
    call = inputs(attn, pattern, 19)
    mask = padding(call, 19, 7)
    mask[0, 3] = False
    how = How(masks.keys(mask), call.causal)

    def output(x: Tensor) -> Tensor:
        heads = attn._heads(x, x, how)
        return attn.core(*heads, mask=how.mask, causal=call.causal, **attn.core.extra(how)).transpose(1, 2)[mask]

    y = output(call.x)
    close(output(torch.where(mask.unsqueeze(-1), call.x, 10 * torch.randn_like(call.x))), y, "output of the core")


@declare("token", when=lambda card: card.mask == "any")
def any_mask_is_honoured(make: Make, card: Card, pattern: str) -> None:
    """A (batch, n, m) mask holds for each pair, and every form of the same mask gives the same output."""
    attn = make()
    call = inputs(attn, pattern, 13, 13)
    mask = torch.rand(2, 13, 13) < 0.6
    mask |= torch.eye(13, dtype=torch.bool)
    y = call(attn, mask)
    for i in (2, 8):
        if call.causal and call.context is None:
            mask[:, i, i + 1 :] = True
        influence = (gradients(y[:, i], call.source)[0] * ~mask[:, i, :, None]).abs().max().item()
        assert influence <= EXACT, f"gradient of output {i} on keys masked for it is {influence:.1e}"
    window = masks.window(3)
    dense = window.dense(2, 1, 13, 13)
    close(call(attn, dense.expand(2, getattr(attn, "heads", 1), 13, 13)), call(attn, window), "window(3) as a tensor")
    close(call(attn, dense[:, 0].expand(2, 13, 13)), call(attn, window), "window(3) as (batch, n, m)")
    keep = padding(call, 13, 5)
    close(call(attn, keep.unsqueeze(1).expand(2, 13, 13)), call(attn, keep), "key padding as (batch, n, m)")


@declare("token", when=lambda card: card.mask != "none")
def empty_rows_are_zero(make: Make, card: Card, pattern: str) -> None:
    """With nothing to read the attention output is zero, and gradients stay finite."""
    attn = make()
    call = inputs(attn, pattern, 9, 9)
    mask = padding(call, 0, 9)
    y = call(attn, mask)
    assert y.isfinite().all(), "output is not finite where nothing may be read"
    for g in gradients(y, call.x, call.source, *attn.parameters()):
        assert g.isfinite().all(), "gradient is not finite where nothing may be read"
    if card.linear_in_values:
        zero = call.read(attn, torch.zeros_like(call.weights(attn, mask)), mask)
        close(y[0], zero[0], "output where nothing may be read, against read(zeros)")
        weight = call.weights(attn, mask)[0].abs().max().item()
        assert weight <= EXACT, f"weights where nothing may be read are {weight:.1e}"


@declare("token")
def gradients_are_exact(make: Make, card: Card, pattern: str) -> None:
    """Gradients of the inputs and of every parameter equal finite differences in float64."""
    attn = make()
    call = inputs(attn, pattern, 7, 5, batch=1)

    def output(x: Tensor, context: Tensor | None = None, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(attn, parameters, (x, context), {"causal": call.causal})

    streams = {"x": call.x} if call.context is None else {"x": call.x, "context": call.context}
    differentiable(output, streams | {name: p for name, p in attn.named_parameters() if p.requires_grad})


@declare("token")
def bfloat16_is_close(make: Make, card: Card, pattern: str) -> None:
    """In bfloat16 the output is bfloat16 and close to that in float64 with the same rounded weights."""
    attn = make().to(torch.bfloat16)
    call = inputs(attn, pattern, 33, 29)
    y = call(attn)
    assert y.dtype == torch.bfloat16, f"output is {y.dtype}"
    exact = Call(call.x.double(), None if call.context is None else call.context.double(), call.causal)
    expected = exact(copy.deepcopy(attn).double())
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < 0.05, f"relative error {error:.3f}"


def _decoded(attn: Mechanism, call: Call, mask: Tensor | None = None) -> tuple[Tensor, list[int]]:
    """All tokens through `step`, and the elements held in the cache after each."""
    cache, parts, sizes = None, [], []
    for i in range(call.x.shape[1]):
        first = {"context": call.context, "mask": mask} if i == 0 else {}
        y, cache = attn.step(call.x[:, i : i + 1], cache, **first)
        parts.append(y)
        sizes.append(sum(t.numel() for t in tensors(cache)))
    return torch.cat(parts, 1), sizes


@declare("token", when=lambda card: card.decode is not None)
def decoding_equals_full_pass(make: Make, card: Card, pattern: str) -> None:
    """Token by token, `step` gives what the causal pass gives at once, with and without gradients."""
    if not pattern.startswith("causal"):
        raise Skip("not a causal pattern")
    attn = make()
    call = inputs(attn, pattern, 19, 7)
    close(_decoded(attn, call)[0], call(attn), "steps")
    with torch.no_grad():
        close(_decoded(attn, call)[0], call(attn), "steps without gradients")
        if call.context is not None and card.mask != "none":
            mask = padding(call, 7, 4)
            close(_decoded(attn, call, mask)[0], call(attn, mask), "steps with the context masked")


@declare("token", when=lambda card: card.decode == "state")
def state_does_not_grow(make: Make, card: Card, pattern: str) -> None:
    """The decoding state holds no more elements after 64 tokens than it did after at most 32."""
    if not pattern.startswith("causal"):
        raise Skip("not a causal pattern")
    attn = make()
    with torch.no_grad():
        sizes = _decoded(attn, inputs(attn, pattern, 64, 5))[1]
    early, late = max(sizes[:32]), max(sizes[32:])
    assert late <= early, f"state grows from {early} to {late} elements"


@declare("token")
def compiles(make: Make, card: Card, pattern: str) -> None:
    """``torch.compile(fullgraph=True)`` gives the same output and gradients."""
    attn = make()
    if pattern == "causal-cross" and "noncausal-cross" in card.patterns and hasattr(attn, "core"):
        raise Skip("a core is called alike in both cross patterns")
    call = inputs(attn, pattern, 9, 6)
    # A mask in cross patterns, none in self patterns: both ways are compiled, each once.
    mask = padding(call, 6, 4) if call.context is not None and card.mask != "none" else None
    twice(attn, lambda run: call(run, mask), [call.x, call.source, *attn.parameters()])


@declare("token")
def state_restores(make: Make, card: Card) -> None:
    """A state_dict, saved and loaded without pickle, and a deepcopy make the same layer again."""
    attn, other = make(seed=0), make(seed=1)
    calls = [inputs(attn, pattern, 9, 6) for pattern in card.patterns]
    restored(attn, other, lambda layer: torch.cat([call(layer) for call in calls]))


@declare("token")
def batch_is_independent(make: Make, card: Card, pattern: str) -> None:
    """An element of a batch gives the same result alone, masked or not."""
    attn = make()
    call = inputs(attn, pattern, 19, 11, batch=3)
    alone = Call(call.x[1:2], None if call.context is None else call.context[1:2], call.causal)
    close(alone(attn), call(attn)[1:2], "output of one element")
    if card.mask != "none":
        mask = padding(call, 11, 5, 8)
        close(alone(attn, mask[1:2]), call(attn, mask)[1:2], "output of one masked element")


@declare("token")
def evaluation_is_deterministic(make: Make, card: Card, pattern: str) -> None:
    """In eval mode the same input gives the same output, bit for bit."""
    attn = make()
    call = inputs(attn, pattern)
    first = call(attn)
    assert torch.equal(first, call(attn)), "a second call gives another output"


@declare("token")
def parameters_learn(make: Make, card: Card) -> None:
    """In training mode every parameter receives a finite gradient in at least one pattern."""
    attn = make().train()
    alive = set()
    wanted = {name: p for name, p in attn.named_parameters() if p.requires_grad}
    for pattern in card.patterns:
        call = inputs(attn, pattern, 33, 29)
        outputs = [call(attn)]
        if getattr(attn, "learned_queries", False) and call.context is not None:
            outputs.append(attn(None, call.context, causal=call.causal))
        for name, g in (pair for y in outputs for pair in zip(wanted, gradients(y, *wanted.values()), strict=True)):
            assert g.isfinite().all(), f"[{pattern}] gradient of {name} is not finite"
            if g.any():
                alive.add(name)
    dead = [name for name in wanted if name not in alive]
    assert not dead, f"no gradient reaches {', '.join(dead)}"


@declare("token")
def float32_by_default(make: Make, card: Card) -> None:
    """The constructor makes float32 parameters and the output follows."""
    attn = make(dtype=None)
    wrong = [name for name, p in attn.named_parameters() if p.dtype != torch.float32]
    assert not wrong, f"not float32: {', '.join(wrong)}"
    y = inputs(attn, card.patterns[0])(attn) if list(attn.parameters()) else torch.zeros(1)
    assert y.dtype == torch.float32, f"output is {y.dtype}"


@declare("token")
def unsupported_patterns_are_refused(make: Make, card: Card) -> None:
    """A pattern that the card does not declare raises `UnsupportedPattern`, which names those it has."""
    attn = make()
    for pattern in set(PATTERNS) - set(card.patterns):
        with refused(card.patterns[0], UnsupportedPattern, also=f"pattern ({pattern})"):
            inputs(attn, pattern)(attn)
    if card.decode is None:
        with refused("step", UnsupportedPattern):
            attn.step(inputs(attn, "causal-self").x[:, :1])


@declare("token")
def bad_input_is_refused(make: Make, card: Card) -> None:
    """A wrong width, rank, dtype, batch, length or mask raises a `CrosslightError` that names the argument."""
    attn = make()
    # Both streams, where there is a cross pattern.
    pattern = next((p for p in card.patterns if p.endswith("cross")), card.patterns[0])
    call = inputs(attn, pattern)
    x, context = call.x.detach(), None if call.context is None else call.context.detach()

    def ask(x: Any = x, context: Any = context, mask: Any = None) -> None:
        attn(x, context, mask=mask, causal=call.causal)

    with refused("x", also="width of x"):
        ask(x=torch.cat([x, x], 2))
    with refused("x", also="rank of x"):
        ask(x=x[0])
    with refused("x", also="x (no tokens)"):
        ask(x=x[:, :0])
    if list(attn.parameters()):
        with refused("x", also="dtype of x"):
            ask(x=x.float())
    if context is not None:
        with refused("context", also="width of context"):
            ask(context=torch.cat([context, context], 2))
        with refused("context", also="rank of context"):
            ask(context=context[0])
        with refused("context", also="context (no tokens)"):
            ask(context=context[:, :0])
        with refused("context", also="batch of context"):
            ask(context=context[:1])
    keys = call.source.shape[1]
    with refused("mask", also="shape of mask"):
        ask(mask=torch.ones(2, keys + 1, dtype=torch.bool))
    with refused("mask", also="dtype of mask"):
        ask(mask=torch.ones(2, keys))
    if card.mask != "any":
        with refused("mask", also="mask of pairs"):
            ask(mask=torch.ones(2, x.shape[1], keys, dtype=torch.bool))
    if card.mask == "none":
        with refused("mask", also="mask of keys"):
            ask(mask=torch.ones(2, keys, dtype=torch.bool))


@declare("token")
def uneven_heads_are_refused(make: Make, card: Card) -> None:
    """A width that is no multiple of the heads is refused by name, or works."""
    refusal, attn = "", None
    try:
        attn = make(dim=15)
    except CrosslightError as error:
        refusal = str(error)
    if attn is None:
        assert "dim" in refusal, f"the error on dim=15 with 2 heads does not name 'dim': {refusal}"
    else:
        call = inputs(attn, card.patterns[0])
        assert call(attn).shape == call.x.shape, "dim=15 with 2 heads was accepted and gives another shape"


@declare("token", when=lambda card: card.growth < 2)
def no_quadratic_tensor(make: Make, card: Card, pattern: str) -> None:
    """Forward and backward allocate no tensor of n * m elements, masked or not."""
    attn = make(dtype=torch.float32)
    call = long(attn, pattern, 1024)
    for mask in (None,) if card.mask == "none" else (None, padding(call, 1000)):
        largest = flops.measure(partial(call, attn, mask)).largest
        assert largest < 1024**2, f"a tensor of {largest} elements at n = m = 1024"


@declare("token")
def work_grows_as_declared(make: Make, card: Card, pattern: str) -> None:
    """Operations, forward and backward, grow with n by the card's exponent and no faster; quadratic is no lie."""
    attn = make(dtype=torch.float32)

    def measured(n: int, factor: int) -> float:
        work = [flops.measure(partial(long(attn, pattern, size), attn)).flops for size in (n, factor * n)]
        return flops.growth(work[0], work[1], factor)

    exponent = measured(256, 4)
    if card.growth >= 2 and exponent <= card.growth - 0.5:
        exponent = measured(1024, 2)  # the sparse engine, which leaves a part of the square out, starts in between
    assert exponent <= card.growth + 0.15, f"work grows as n^{exponent:.2f}, declared {card.cost}"
    assert card.growth < 2 or exponent > card.growth - 0.5, f"work grows as n^{exponent:.2f} only, declared {card.cost}"


@declare("token")
def heads_may_be_grouped(make: Make, card: Card, pattern: str) -> None:
    """Key/value heads shared by groups of query heads give what the same heads repeated give."""
    if not make.takes("kv_heads"):
        raise Skip("it has no kv_heads")
    attn, full = make(kv_heads=1), make(kv_heads=2)
    call = inputs(attn, pattern)
    y = call(attn)
    if card.linear_in_values:
        close(call.read(attn, call.weights(attn)), y, "read(weights) with one key/value head")
    own = attn.state_dict()
    for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
        if name in own:
            own[name] = torch.cat([own[name]] * 2)
    full.load_state_dict(own)
    close(call(full), y, "output with repeated heads")


declare("token")(published_sizes)
