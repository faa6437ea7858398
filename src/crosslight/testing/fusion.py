"""The checks of kind fusion: named streams in, named streams out.

A row brings ``sample(**options) -> (block, streams)``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from crosslight.cards import Card
from crosslight.fusion.base import Fusion
from crosslight.testing.common import EXACT, close, differentiable, gradients, published_sizes, refused, restored, twice
from crosslight.testing.suite import Make, declare

declare("fusion")(published_sizes)

Streams = dict[str, Tensor]


def drawn(make: Make) -> tuple[Fusion, Streams]:
    """A block and streams for it, in its dtype and under its own names, that ask for gradients."""
    block, streams = make.example()
    named = zip(block.widths.items(), streams.values(), strict=True)
    fitting = {name: torch.randn(*t.shape[:2], width, dtype=t.dtype) for (name, width), t in named}
    return block, {name: t.requires_grad_() for name, t in fitting.items()}


def joined(out: Streams) -> Tensor:
    return torch.cat([y.flatten() for y in out.values()])


@declare("fusion")
def outputs_are_those_of_flow(make: Make, card: Card) -> None:
    """The block returns the streams that `flow` lists, (batch, tokens, width), finite."""
    block, streams = drawn(make)
    out = block(streams)
    assert set(out) == set(block.flow), f"output has {sorted(out)}, flow has {sorted(block.flow)}"
    for name, y in out.items():
        assert y.dim() == 3, f"{name} is {tuple(y.shape)}, expected (batch, tokens, width)"
        assert y.shape[0] == 2, f"{name} has batch {y.shape[0]}, expected 2"
        assert y.isfinite().all(), f"{name} is not finite"


@declare("fusion")
def streams_read_as_declared(make: Make, card: Card) -> None:
    """Each output depends on the streams that `flow` names for it, and on no other."""
    block, streams = drawn(make)
    for name, y in block(streams).items():
        for source, g in zip(streams, gradients(y, *streams.values()), strict=True):
            size = g.abs().max().item()
            if source in block.flow[name]:
                assert size > 0, f"{name} does not depend on {source}, which flow declares"
            else:
                assert size <= EXACT, f"{name} depends on {source} ({size:.1e}), which flow does not declare"


@declare("fusion", when=lambda card: card.mask != "none")
def masked_tokens_have_no_influence(make: Make, card: Card) -> None:
    """No other token depends on a masked one: not in another stream, nor elsewhere in its own."""
    block, streams = drawn(make)
    for source, t in streams.items():
        mask = torch.ones(t.shape[:2], dtype=torch.bool)
        mask[0, -1] = False
        for name, y in block(streams, {source: mask}).items():
            # A masked token still asks: its own output, where it has one, may depend on it.
            others = y[0, :-1] if y.shape[1] == t.shape[1] else y[0]
            influence = gradients(others, t)[0][0, -1].abs().max().item()
            assert influence <= EXACT, f"{name} depends on a masked token of {source} ({influence:.1e})"


@declare("fusion", when=lambda card: card.mask != "none")
def empty_streams_stay_finite(make: Make, card: Card) -> None:
    """With everything masked, outputs and gradients are finite."""
    block, streams = drawn(make)
    y = joined(block(streams, {name: torch.zeros(t.shape[:2], dtype=torch.bool) for name, t in streams.items()}))
    assert y.isfinite().all(), "output is not finite with everything masked"
    for g in gradients(y, *streams.values(), *block.parameters()):
        assert g.isfinite().all(), "gradient is not finite with everything masked"


@declare("fusion")
def gradients_are_exact(make: Make, card: Card) -> None:
    """Gradients of the streams and of every parameter equal finite differences in float64."""
    block, streams = drawn(make)

    def output(**given: Tensor) -> Tensor:
        parameters = {name: t for name, t in given.items() if name not in streams}
        return joined(torch.func.functional_call(block, parameters, ({name: given[name] for name in streams},)))

    differentiable(output, streams | {name: p for name, p in block.named_parameters() if p.requires_grad})


@declare("fusion")
def bfloat16_is_close(make: Make, card: Card) -> None:
    """In bfloat16 the outputs are bfloat16 and close to those in float64 with the same rounded weights."""
    block, streams = drawn(make)
    block, streams = block.to(torch.bfloat16), {name: t.to(torch.bfloat16) for name, t in streams.items()}
    out, exact = block(streams), copy.deepcopy(block).double()({name: t.double() for name, t in streams.items()})
    for name, y in out.items():
        assert y.dtype == torch.bfloat16, f"{name} is {y.dtype}"
        error = ((y.double() - exact[name]).norm() / exact[name].norm()).item()
        assert error < 0.05, f"{name} has a relative error of {error:.3f}"


@declare("fusion")
def compiles(make: Make, card: Card) -> None:
    """``torch.compile(fullgraph=True)`` gives the same outputs and gradients."""
    block, streams = drawn(make)
    twice(block, lambda run: joined(run(streams)), [*streams.values(), *block.parameters()])


@declare("fusion")
def state_restores(make: Make, card: Card) -> None:
    """A state_dict, saved and loaded without pickle, and a deepcopy make the same block again."""
    (block, streams), (other, _) = drawn(make), make.example(seed=1)
    restored(block, other, lambda module: joined(module(streams)))


@declare("fusion")
def batch_is_independent(make: Make, card: Card) -> None:
    """In eval mode an element of a batch gives the same result alone."""
    block, streams = drawn(make)
    alone = block({name: t[1:2] for name, t in streams.items()})
    for name, y in block(streams).items():
        close(alone[name], y[1:2], f"{name} of one element")


@declare("fusion")
def evaluation_is_deterministic(make: Make, card: Card) -> None:
    """In eval mode the same input gives the same output, bit for bit."""
    block, streams = drawn(make)
    assert torch.equal(joined(block(streams)), joined(block(streams))), "a second call gives another output"


@declare("fusion")
def parameters_learn(make: Make, card: Card) -> None:
    """In training mode every parameter receives a finite gradient that is not zero."""
    block, streams = drawn(make)
    wanted = {name: p for name, p in block.train().named_parameters() if p.requires_grad}
    dead = []
    for name, g in zip(wanted, gradients(joined(block(streams)), *wanted.values()), strict=True):
        assert g.isfinite().all(), f"gradient of {name} is not finite"
        if not g.any():
            dead.append(name)
    assert not dead, f"no gradient reaches {', '.join(dead)}"


@declare("fusion")
def bad_input_is_refused(make: Make, card: Card) -> None:
    """A missing or unknown stream, a wrong width or mask raises a `CrosslightError` that names the argument."""
    block, drawn_streams = drawn(make)
    streams = {name: t.detach() for name, t in drawn_streams.items()}
    first = next(iter(streams))
    with refused("streams", also="set of streams (one is missing)"):
        block({name: t for name, t in streams.items() if name != first})
    with refused("streams", also="set of streams (one is unknown)"):
        block({**streams, "no such stream": streams[first]})
    with refused(first, also=f"width of {first}"):
        block({**streams, first: torch.cat([streams[first]] * 2, 2)})
    with refused(first, also=f"dtype of {first}"):
        block({**streams, first: streams[first].float()})
    with refused(first, also=f"mask of {first}"):
        block(streams, {first: torch.ones(2, streams[first].shape[1] + 1, dtype=torch.bool)})
    with refused("masks", also="set of masks (one is unknown)"):
        block(streams, {"no such stream": torch.ones(2, 3, dtype=torch.bool)})
