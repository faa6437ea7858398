"""Systems of the other kinds, sound ones and ones that break one promise each."""

from __future__ import annotations

from dataclasses import replace

import torch
from broken_token import CARD, Plain
from torch import nn

from crosslight.explain.base import Reading
from crosslight.fusion.base import Fusion
from crosslight.maps.base import MapAttention
from crosslight.testing.control import host


def card(kind):
    return replace(CARD, id=f"plain-{kind}", kind=kind, patterns=(), decode=None)


# kind map -----------------------------------------------------------------------------------------------------------
class Gate(MapAttention):
    card = card("map")
    space = (1, 2, 3)

    def __init__(self, channels):
        super().__init__(channels)
        self.mix = nn.Linear(channels, channels)

    def _weights(self, x):
        return self.mix(x.flatten(2).mean(2)).sigmoid().view(*x.shape[:2], *[1] * (x.dim() - 2))


class EvenSides(Gate):
    def _forward(self, x):
        return super()._forward(x)[..., : max(1, x.shape[-1] // 2 * 2)]


class GateAboveOne(Gate):
    def _weights(self, x):
        return 2 * super()._weights(x)


class OtherGate(Gate):
    def _forward(self, x):
        return x * self._weights(2 * x)


class HalfTheGradient(Gate):
    def _weights(self, x):
        return super()._weights(x.detach())


class AlwaysFloat32(Gate):
    def _forward(self, x):
        return super()._forward(x).to(torch.promote_types(x.dtype, torch.float32))


class BreaksTheGraph(Gate):
    def _forward(self, x):
        return super()._forward(x) if x.sum().item() else x


class ForgetsItsBuffer(Gate):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("shift", torch.randn(channels), persistent=False)

    def _weights(self, x):
        return super()._weights(x + self.shift.view(-1, *[1] * (x.dim() - 2)))


class MixesTheBatch(Gate):
    def __init__(self, channels):
        super().__init__(channels)
        self.norm = nn.BatchNorm1d(channels, track_running_stats=False)

    def _weights(self, x):
        return super()._weights(self.norm(x.flatten(2)))[..., None].view(*x.shape[:2], *[1] * (x.dim() - 2))


class AlwaysDrops(Gate):
    def _forward(self, x):
        return nn.functional.dropout(super()._forward(x))


class DeadParameter(Gate):
    def __init__(self, channels):
        super().__init__(channels)
        self.unused = nn.Parameter(torch.ones(1))


class BuiltInFloat64(Gate):
    def __init__(self, channels):
        super().__init__(channels)
        self.mix.double()


class ChecksNothing(Gate):
    def _checked(self, x):
        return x


MAP = {
    "shape_is_kept": [EvenSides],
    "weights_are_the_gate": [GateAboveOne, OtherGate],
    "gradients_are_exact": [HalfTheGradient],
    "bfloat16_is_close": [AlwaysFloat32],
    "compiles": [BreaksTheGraph],
    "state_restores": [ForgetsItsBuffer],
    "batch_is_independent": [MixesTheBatch],
    "evaluation_is_deterministic": [AlwaysDrops],
    "parameters_learn": [DeadParameter],
    "float32_by_default": [BuiltInFloat64],
    "bad_input_is_refused": [ChecksNothing],
}


# kind fusion --------------------------------------------------------------------------------------------------------
class Exchange(Fusion):
    """a reads b, by softmax; b passes nothing back and c is not read."""

    card = card("fusion")

    def __init__(self, streams):
        super().__init__(streams)
        (_, a), (_, b), _ = self.widths.items()
        self.attend = Plain.build(a, 2, context_dim=b)

    @property
    def flow(self):
        a, b, _ = self.widths
        return {a: (a, b)}

    @classmethod
    def sample(cls, **options):
        block = cls(**{"streams": {"a": 8, "b": 12, "c": 8}, **options})
        return block, {name: torch.randn(2, 5 + i, width) for i, (name, width) in enumerate(block.widths.items())}

    def _read(self, streams, masks):
        a, b, c = self.widths
        return a, streams[a], b, streams[b], masks.get(b), streams[c]

    def _forward(self, streams, masks):
        a, x, _, z, mask, _ = self._read(streams, masks)
        return {a: x + self.attend(x, z, mask=mask)}


class ReturnsMore(Exchange):
    def _forward(self, streams, masks):
        return {**super()._forward(streams, masks), "c": streams["c"]}


class ReadsInSecret(Exchange):
    def _forward(self, streams, masks):
        out = super()._forward(streams, masks)
        return {name: y + streams["c"].mean((1, 2), keepdim=True) for name, y in out.items()}


class ReadsNothing(Exchange):
    def _forward(self, streams, masks):
        return {"a": streams["a"]}


class IgnoresMasks(Exchange):
    def _forward(self, streams, masks):
        return super()._forward(streams, {})


class NaNWhenEmpty(Exchange):
    def _forward(self, streams, masks):
        keep = masks.get("b", torch.ones(streams["b"].shape[:2], dtype=torch.bool))
        mean = (streams["b"] * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        return {"a": streams["a"] + mean[:, None, :8]}


class FusionHalfTheGradient(Exchange):
    def _forward(self, streams, masks):
        return super()._forward({**streams, "b": (streams["b"] + streams["b"].detach()) / 2}, masks)


class FusionFloat32(Exchange):
    def _forward(self, streams, masks):
        return {
            n: y.to(torch.promote_types(y.dtype, torch.float32)) for n, y in super()._forward(streams, masks).items()
        }


class FusionBreaksTheGraph(Exchange):
    def _forward(self, streams, masks):
        return super()._forward(streams, masks) if streams["a"].sum().item() else {}


class FusionForgetsItsBuffer(Exchange):
    def __init__(self, streams):
        super().__init__(streams)
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def _forward(self, streams, masks):
        return {name: y + self.shift for name, y in super()._forward(streams, masks).items()}


class FusionMixesTheBatch(Exchange):
    def _forward(self, streams, masks):
        return {name: y - y.mean(0, keepdim=True) for name, y in super()._forward(streams, masks).items()}


class FusionAlwaysDrops(Exchange):
    def _forward(self, streams, masks):
        return {name: nn.functional.dropout(y) for name, y in super()._forward(streams, masks).items()}


class FusionDeadParameter(Exchange):
    def __init__(self, streams):
        super().__init__(streams)
        self.unused = nn.Parameter(torch.ones(1))


class FusionChecksNothing(Exchange):
    def _checked(self, streams, masks):
        return streams, masks or {}


class WrongSize(Exchange):
    presets = {"tiny": {"streams": {"a": 4, "b": 4, "c": 4}}}
    published = {"tiny": 7}


FUSION = {
    "published_sizes": [WrongSize],
    "outputs_are_those_of_flow": [ReturnsMore],
    "streams_read_as_declared": [ReadsInSecret, ReadsNothing],
    "masked_tokens_have_no_influence": [IgnoresMasks],
    "empty_streams_stay_finite": [NaNWhenEmpty],
    "gradients_are_exact": [FusionHalfTheGradient],
    "bfloat16_is_close": [FusionFloat32],
    "compiles": [FusionBreaksTheGraph],
    "state_restores": [FusionForgetsItsBuffer],
    "batch_is_independent": [FusionMixesTheBatch],
    "evaluation_is_deterministic": [FusionAlwaysDrops],
    "parameters_learn": [FusionDeadParameter],
    "bad_input_is_refused": [FusionChecksNothing],
}


# kind model ---------------------------------------------------------------------------------------------------------
class Network(nn.Module):
    card = card("model")
    presets = {"tiny": {"width": 4}}
    published = {"tiny": 6 * 4 + 4}

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(6, width)

    @classmethod
    def sample(cls, **options):
        return cls(**{"width": 4, **options}), {"x": torch.randn(2, 6)}

    def forward(self, x):
        return self.layer(x)


class NotItsPublishedSize(Network):
    published = {"tiny": 29}


class ModelDeadParameter(Network):
    published = {}

    def __init__(self, width):
        super().__init__(width)
        self.unused = nn.Parameter(torch.ones(1))


class ModelNotFinite(Network):
    def forward(self, x):
        return self.layer(x) / 0


class ModelAlwaysDrops(Network):
    def forward(self, x):
        return nn.functional.dropout(self.layer(x))


class ModelMixesTheBatch(Network):
    def forward(self, x):
        return self.layer(x - x.mean(0))


class ModelForgetsItsBuffer(Network):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("shift", torch.randn(width), persistent=False)

    def forward(self, x):
        return self.layer(x) + self.shift


MODEL = {
    "published_sizes": [NotItsPublishedSize],
    "forward_and_backward_are_finite": [ModelDeadParameter, ModelNotFinite],
    "evaluation_is_deterministic": [ModelAlwaysDrops],
    "batch_is_independent": [ModelMixesTheBatch],
    "state_restores": [ModelForgetsItsBuffer],
}


# kind control -------------------------------------------------------------------------------------------------------
class Sharpen:
    """Attention to the power 1 + strength, normalised."""

    card = card("control")

    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, weights, call):
        sharper = weights ** (1 + self.strength)
        return sharper / sharper.sum(-1, keepdim=True)


class StrengthForOthers(Sharpen):
    """Its own knob is not the ``strength`` that `steer` looks at."""

    def __init__(self, strength=1.0):
        self.power = strength

    def __call__(self, weights, call):
        return weights ** (1.001 + self.power)


class DoesNothing(Sharpen):
    def __call__(self, weights, call):
        return weights


class ControlNotFinite(Sharpen):
    def __call__(self, weights, call):
        return weights.log() * 0 / 0


class LeavesTraces(Sharpen):
    def __call__(self, weights, call):
        with torch.no_grad():
            call.site.module.out.bias += 1
        return super().__call__(weights, call)


CONTROL = {
    "strength_zero_changes_nothing": [StrengthForOthers],
    "rule_acts_and_stays_finite": [DoesNothing, ControlNotFinite],
    "leaving_restores": [LeavesTraces],
}


# kind explain -------------------------------------------------------------------------------------------------------
class Gradients:
    """|x * dy/dx|, summed over channels."""

    card = card("explain")

    @classmethod
    def sample(cls, **options):
        return cls(**options), {"model": host(), "x": torch.randn(2, 6, 16)}

    def __call__(self, model, x):
        x = x.detach().requires_grad_()
        return Reading({"x": (torch.autograd.grad(model(x).square().sum(), x)[0] * x).abs().sum(-1).detach()})


class ReadsNaN(Gradients):
    def __call__(self, model, x):
        return Reading({"x": super().__call__(model, x).scores["x"].log().mul(torch.nan)})


class AllAlike(Gradients):
    def __call__(self, model, x):
        return Reading({"x": torch.ones(2, 6)})


class ReturnsATensor(Gradients):
    def __call__(self, model, x):
        return super().__call__(model, x).scores["x"]


class ReadsAtRandom(Gradients):
    def __call__(self, model, x):
        return super().__call__(model, x + torch.randn_like(x))


class LeavesGradients(Gradients):
    def __call__(self, model, x):
        model(x).sum().backward()
        return super().__call__(model, x)


class LeavesTraining(Gradients):
    def __call__(self, model, x):
        return super().__call__(model.train(), x)


EXPLAIN = {
    "reading_is_finite": [ReadsNaN, AllAlike, ReturnsATensor],
    "reading_is_deterministic": [ReadsAtRandom],
    "model_is_left_as_it_was": [LeavesGradients, LeavesTraining],
}


# kind training ------------------------------------------------------------------------------------------------------
class Loss(nn.Module):
    card = card("training")

    @classmethod
    def sample(cls, **options):
        return cls(**options), {"prediction": torch.randn(2, 3), "target": torch.randint(3, (2,))}

    def forward(self, prediction, target):
        return nn.functional.cross_entropy(prediction, target)


class LossPerElement(Loss):
    def forward(self, prediction, target):
        return nn.functional.cross_entropy(prediction, target, reduction="none")


class LossNotFinite(Loss):
    def forward(self, prediction, target):
        return super().forward(prediction, target) * torch.inf


class LossWithoutGradient(Loss):
    def forward(self, prediction, target):
        return super().forward(prediction.detach(), target)


class LossHalfTheGradient(Loss):
    def forward(self, prediction, target):
        return super().forward((prediction + prediction.detach()) / 2, target)


class LossAtRandom(Loss):
    def forward(self, prediction, target):
        return super().forward(nn.functional.dropout(prediction), target)


class LossLosesDigits(Loss):
    def forward(self, prediction, target):
        return super().forward(prediction, target) + 1e6 - 1e6


TRAINING = {
    "loss_is_a_finite_number": [LossPerElement, LossNotFinite, LossWithoutGradient],
    "gradients_are_exact": [LossHalfTheGradient],
    "loss_is_deterministic": [LossAtRandom, LossLosesDigits],
}

OTHERS = {
    "map": MAP,
    "fusion": FUSION,
    "model": MODEL,
    "control": CONTROL,
    "explain": EXPLAIN,
    "training": TRAINING,
}
SOUND = (Gate, Exchange, Network, Sharpen, Gradients, Loss)
