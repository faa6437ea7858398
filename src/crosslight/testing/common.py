"""What the checks of several kinds ask: equality, gradients, refusals, restored and compiled modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosslight.cards import Card
from crosslight.errors import CrosslightError
from crosslight.testing.suite import Skip

#: Two orders of summation agree to this in float64; what leaks or is ignored is larger by orders of magnitude.
EXACT = 1e-9


def close(a: Tensor, b: Tensor, what: str, tolerance: float = EXACT) -> None:
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    assert a.isfinite().all() or not b.isfinite().all(), f"{what}: not finite"
    gap = (a - b).abs().max().item()
    assert gap <= tolerance * (1 + b.abs().max().item()), f"{what}: differs by {gap:.1e}"


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    """Gradients of a random projection of ``y``; zeros where it does not depend on a tensor."""
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in of]
    found = torch.autograd.grad(y, of, torch.randn_like(y), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of, strict=True)]


class refused:
    """``with refused("mask"):`` the block raises a `CrosslightError` whose line names the argument."""

    def __init__(self, argument: str, kind: type[CrosslightError] = CrosslightError, also: str = "") -> None:
        self.argument, self.kind, self.also = argument, kind, also or argument

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        assert error is not None, f"a wrong {self.also} was accepted"
        assert isinstance(error, self.kind), (
            f"a wrong {self.also} raised {type(error).__name__}, expected {self.kind.__name__}"
        )
        assert self.argument in str(error), f"the error on a wrong {self.also} does not name {self.argument!r}: {error}"
        return True


def differentiable(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    """The gradient of ``function(**inputs)``, a random projection of it, equals central differences along a random
    direction for each input. (`torch.autograd.gradcheck` asks the same but is slow to say what is wrong.)"""
    step, y = 1e-6, function(**inputs)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, list(inputs.values()), cotangent, allow_unused=True)
    for (name, t), g in zip(inputs.items(), found, strict=True):
        direction = torch.randn_like(t)
        with torch.no_grad():
            ahead, behind = (function(**{**inputs, name: t + sign * step * direction}) for sign in (1, -1))
            expected = ((ahead - behind) * cotangent).sum().item() / (2 * step)
        slope = 0.0 if g is None else (g * direction).sum().item()
        gap = abs(slope - expected)
        assert gap <= 1e-5 * (1 + abs(expected)), f"gradient of {name} is {slope:.6g}, by differences {expected:.6g}"


def restored(module: nn.Module, other: nn.Module, output: Callable[[Any], Tensor]) -> None:
    """``other``, built with another seed, and a deepcopy give the output of ``module`` once they hold its state."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    y = output(module)
    close(output(other), y, "output after load_state_dict")
    close(output(copy.deepcopy(module)), y, "output of a deepcopy")


def twice(module: nn.Module, output: Callable[[Any], Tensor], of: Sequence[Tensor]) -> None:
    """``module`` gives the same output and gradients compiled, in one graph."""
    torch._dynamo.reset()
    torch.set_default_device(None)  # under which no graph would be whole
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for run in (module, compiled):
        with torch.random.fork_rng(devices=[]):
            y = output(run)
            results.append([y, *gradients(y, *of)])
    for eager, traced in zip(*results, strict=True):
        close(traced, eager, "compiled against eager")


def published_sizes(make: Any, card: Card) -> None:
    """Every preset builds (on the meta device), and has as many parameters as were published for it."""
    network = getattr(make.cls, "network", make.cls)
    presets, published = getattr(network, "presets", {}), getattr(network, "published", {})
    if not presets:
        raise Skip("it has no presets")
    unknown = sorted(set(published) - set(presets))
    assert not unknown, f"published sizes of {', '.join(unknown)}, which are no presets"
    for name, options in presets.items():
        with torch.device("meta"):
            model = network(**options)
        count = sum(p.numel() for p in model.parameters())
        assert name not in published or count == published[name], (
            f"{name} has {count} parameters, not {published[name]}"
        )
