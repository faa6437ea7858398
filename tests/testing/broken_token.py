"""Attention layers that break one promise each, by the name of the check that must see it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from crosslight.attention.base import AttentionLayer, Core, Mechanism
from crosslight.cards import Card
from crosslight.engines import dense, masks
from crosslight.engines.backend import forced
from crosslight.engines.cache import KVCache

CARD = Card(
    id="plain",
    kind="token",
    group="test",
    title="Plain",
    year=2017,
    paper="none",
    summary="Softmax attention with nothing wrong.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    decode="kv",
)
SELF = replace(CARD, patterns=("noncausal-self",), decode=None)


class Plain(Core):
    """Nothing wrong with it."""

    card = CARD

    def forward(self, q, k, v, *, mask=None, causal=False):
        return dense.attend(q, k, v, mask=mask, causal=causal)

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=mask, causal=causal)


class WrongSize(Plain):
    """Its network has other sizes than were published."""

    class network(nn.Linear):
        presets = {"tiny": {"in_features": 4, "out_features": 1}}
        published = {"tiny": 7}


class PlainLayer(Mechanism):
    """Nothing wrong with it, and no core."""

    card = SELF

    def __init__(self, dim, heads):
        super().__init__(dim)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def _heads(self, x):
        return self.qkv(x).unflatten(-1, (3, self.heads, self.dim // self.heads)).permute(2, 0, 3, 1, 4)

    def _weights(self, x, context, how):
        q, k, _ = self._heads(x)
        return dense.weights(q, k, mask=how.mask)

    def _read(self, weights, x, context, how):
        return (weights @ self._heads(x)[2]).transpose(1, 2).flatten(2)

    def _forward(self, x, context, how):
        return self._read(self._weights(x, context, how), x, context, how)


class NeedsWholeBlocks(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how)[:, :, : max(1, q.shape[2] // 8 * 8)]


class NotFiniteAtOne(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how) / (k.shape[2] - 1)


class ForgetsContextWidth(PlainLayer):
    card = replace(CARD, decode=None)

    def __init__(self, dim, heads, context_dim=None):
        super().__init__(dim, heads)
        self.context_dim = dim if context_dim is None else context_dim

    def _forward(self, x, context, how):
        return x + self.qkv(context)[..., : self.dim].mean(1, keepdim=True)


class OtherWeights(Plain):
    def weights(self, q, k, **how):
        return super().weights(2 * q, k, **how)


class OtherReference(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how) * (1.01 if forced() == "reference" else 1.0)


class SeesTheFuture(Plain):
    def forward(self, q, k, v, *, mask=None, causal=False):
        return dense.attend(q, k, v, mask=mask)


class RoutesByTheFuture(Plain):
    """No gradient tells: the last key decides which way all queries go."""

    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how) * k[:, :, -1:, :1].sign()


class CausalAcross(PlainLayer):
    card = replace(CARD, patterns=("causal-cross",), decode=None)

    def _forward(self, x, context, how):
        return x + context[:, :1]


class IgnoresPadding(Plain):
    def forward(self, q, k, v, *, mask=None, causal=False):
        return dense.attend(q, k, v, causal=causal)


class PadsTheMean(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how) + v.mean(2, keepdim=True).detach()


class CountsPadding(Plain):
    """Scaled by a running size of the queries, in which those of padding count."""

    def __init__(self, heads, head_dim):
        super().__init__(heads, head_dim)
        self.register_buffer("size", torch.ones(()))

    def forward(self, q, k, v, **how):
        if self.training:
            self.size = q.detach().abs().mean()
        return super().forward(q, k, v, **how) / self.size


class TellsByTheLayer(Plain):
    """Its own layer hides padded queries, which a host does not know of."""

    class layer(AttentionLayer):
        def _extra(self, how):
            return {} if how.cross else {"asking": masks.split(how.mask)[1]}

    def forward(self, q, k, v, *, asking=None, **how):
        kept = q if asking is None else q * asking[:, None, :, None]
        return super().forward(q, k, v, **how) + kept.mean(2, keepdim=True)


class PaddingOnly(Plain):
    def forward(self, q, k, v, *, mask=None, causal=False):
        flag, keep, _ = masks.split(mask)
        return dense.attend(q, k, v, mask=None if keep is None else masks.keys(keep), causal=causal or flag)


class UniformWhenEmpty(Plain):
    def forward(self, q, k, v, *, mask=None, causal=False):
        seen = dense.visible(q, k, mask, causal)
        scores = dense.scores(q, k)
        return (scores if seen is None else scores.masked_fill(~seen, -1e30)).softmax(-1) @ v


class NaNWhenEmpty(Plain):
    def forward(self, q, k, v, *, mask=None, causal=False):
        seen = dense.visible(q, k, mask, causal)
        scores = dense.scores(q, k)
        return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1) @ v


class HalfTheGradient(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k.detach(), v, **how)


class AlwaysFloat32(PlainLayer):
    def _forward(self, x, context, how):
        return super()._forward(x, context, how).to(torch.promote_types(x.dtype, torch.float32))


class LosesDigits(Plain):
    def forward(self, q, k, v, **how):
        return (super().forward(q, k, v, **how) + 1000) - 1000


class ForgetsTheFirstToken(Plain):
    def step(self, q, k, v, state, **extra):
        state = KVCache.start(k, v) if state is None else state.append(k, v)
        return self(q, state.keys[:, :, -8:], state.values[:, :, -8:]), state


class GrowingState(Plain):
    card = replace(CARD, decode="state")


class BreaksTheGraph(Plain):
    def forward(self, q, k, v, **how):
        scale = 1.0 if q.sum().item() else 0.0
        return scale * super().forward(q, k, v, **how)


class ForgetsItsBuffer(Plain):
    def __init__(self, heads, head_dim):
        super().__init__(heads, head_dim)
        self.register_buffer("mix", torch.randn(head_dim), persistent=False)

    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how) * self.mix


class CopiesBadly(Plain):
    def __deepcopy__(self, memo):
        return OtherValues(self.heads, self.head_dim)


class OtherValues(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k, 2 * v, **how)


class MixesTheBatch(Plain):
    def forward(self, q, k, v, **how):
        return super().forward(q, k - k.mean(0, keepdim=True), v, **how)


class AlwaysDrops(Plain):
    def forward(self, q, k, v, **how):
        return nn.functional.dropout(super().forward(q, k, v, **how), 0.5)


class DeadParameter(Plain):
    def __init__(self, heads, head_dim):
        super().__init__(heads, head_dim)
        self.unused = nn.Parameter(torch.ones(1))


class BuiltInFloat64(Plain):
    def __init__(self, heads, head_dim):
        super().__init__(heads, head_dim)
        self.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))


class ChecksNothing(PlainLayer):
    def _checked(self, x, context, mask, causal, grid):
        from crosslight.attention.base import How

        return x, x if context is None else context, How()


class TrustsTheContext(PlainLayer):
    card = replace(CARD, patterns=("noncausal-self", "noncausal-cross"), decode=None)

    def _checked(self, x, context, mask, causal, grid):
        x, _, how = super()._checked(x, None, None if context is not None else mask, causal, grid)
        return x, x if context is None else context, how


class TorchErrors(PlainLayer):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        assert dim % heads == 0, "dim % heads"


class LinearOnPaper(Plain):
    card = replace(CARD, cost="n")


class DenseWhenMasked(PlainLayer):
    """Linear, but its mask becomes a matrix."""

    card = replace(SELF, cost="n")

    def _forward(self, x, context, how):
        y = self.qkv(x)[..., : self.dim]
        if how.mask is not None:
            n = x.shape[1]
            y = y * how.mask.dense(x.shape[0], 1, n, n).clone()[:, 0, :, :1]
        return y


class QuadraticOnPaper(PlainLayer):
    def _forward(self, x, context, how):
        return self.qkv(x)[..., : self.dim]


class CountsItsKeyHeads(Plain):
    grouped = True

    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how) * k.shape[1]


TOKEN = {
    "shapes_at_any_length": [NeedsWholeBlocks, NotFiniteAtOne],
    "context_has_its_own_width": [ForgetsContextWidth],
    "fast_path_equals_weights": [OtherWeights],
    "backends_agree": [OtherReference],
    "causal_does_not_leak": [SeesTheFuture, RoutesByTheFuture],
    "causal_cross_sees_all_context": [CausalAcross],
    "masked_keys_have_no_influence": [IgnoresPadding, PadsTheMean],
    "training_leaves_out_padding": [CountsPadding],
    "core_is_told_of_padding": [TellsByTheLayer],
    "any_mask_is_honoured": [PaddingOnly],
    "empty_rows_are_zero": [UniformWhenEmpty, NaNWhenEmpty],
    "gradients_are_exact": [HalfTheGradient],
    "bfloat16_is_close": [AlwaysFloat32, LosesDigits],
    "decoding_equals_full_pass": [ForgetsTheFirstToken],
    "state_does_not_grow": [GrowingState],
    "compiles": [BreaksTheGraph],
    "state_restores": [ForgetsItsBuffer, CopiesBadly],
    "batch_is_independent": [MixesTheBatch],
    "evaluation_is_deterministic": [AlwaysDrops],
    "parameters_learn": [DeadParameter],
    "float32_by_default": [BuiltInFloat64],
    "unsupported_patterns_are_refused": [ChecksNothing],
    "bad_input_is_refused": [ChecksNothing, TrustsTheContext],
    "uneven_heads_are_refused": [PlainLayer, TorchErrors],
    "no_quadratic_tensor": [LinearOnPaper, DenseWhenMasked],
    "work_grows_as_declared": [LinearOnPaper, QuadraticOnPaper],
    "heads_may_be_grouped": [CountsItsKeyHeads],
    "published_sizes": [WrongSize],
}
