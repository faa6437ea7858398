"""Dense attention: a score for every pair, a normaliser over each row of scores, a weighted sum of values.

Softmax goes to ``scaled_dot_product_attention``. Every other normaliser runs over chunks of queries that are
recomputed in the backward pass, so that no (n, m) tensor is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crosslight.engines import masks
from crosslight.engines.backend import forced
from crosslight.engines.masks import Mask
from crosslight.engines.positions import Bias

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Query = Float[Tensor, "batch heads n dim"]
    Key = Float[Tensor, "batch kv_heads m dim"]
    Value = Float[Tensor, "batch kv_heads m value_dim"]
    Weights = Float[Tensor, "batch heads n m"]

#: (scores, keep) -> weights, both (batch, heads, n, m); keep is None or a bool that broadcasts, True = may be read.
#: Must give weight 0 where keep is False, also in a row with nothing to read, with finite gradients.
Normaliser = Callable[[Tensor, "Tensor | None"], Tensor]

#: Scores that one chunk of queries may hold (elements); above it the queries are taken in chunks.
CHUNK = 1 << 24


def softmax(scores: Weights, keep: Bool[Tensor, "#batch #heads n m"] | None) -> Weights:
    """Row softmax; rows with nothing to read are zero."""
    if keep is None:
        return scores.softmax(-1)
    # The finite floor keeps gradients finite in empty rows, which the second fill zeroes.
    floor = torch.finfo(scores.dtype).min
    return scores.masked_fill(~keep, floor).softmax(-1).masked_fill(~keep, 0.0)


def sigmoid(scores: Weights, keep: Bool[Tensor, "#batch #heads n m"] | None, bias: float | None = None) -> Weights:
    """sigmoid(scores + bias), each weight on its own; ``bias`` is -log(keys that the row may read) unless given."""
    if bias is not None:
        weights = (scores + bias).sigmoid()
    elif keep is None:
        weights = (scores - math.log(scores.shape[-1])).sigmoid()
    else:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        count = keep.expand(*keep.shape[:-1], scores.shape[-1]).sum(-1, keepdim=True, dtype=dtype)
        weights = (scores - count.clamp(min=1).log().to(scores.dtype)).sigmoid()
    return weights if keep is None else weights.masked_fill(~keep, 0.0)


def signed(scores: Weights, keep: Bool[Tensor, "#batch #heads n m"] | None) -> Weights:
    """The softmax of the magnitudes with the signs of the scores: a row's magnitudes sum to 1."""
    return scores.sign() * softmax(scores.abs(), keep)


def repeat_heads(kv: Float[Tensor, "batch kv_heads m dim"], heads: int) -> Float[Tensor, "batch heads m dim"]:
    """Each key/value head repeated for the query heads of its group."""
    if kv.shape[1] == heads:
        return kv
    # Of a single head this is a view, so that all queries read the same numbers.
    return kv.unsqueeze(2).expand(-1, -1, heads // kv.shape[1], -1, -1).flatten(1, 2)


def visible(
    q: Query, k: Key, mask: Mask | None, causal: bool, offset: int = 0
) -> Bool[Tensor, "#batch #heads n m"] | None:
    """The boolean matrix of ``mask`` and the causal flag, or None if everything may be read."""
    mask = masks.join(masks.Causal() if causal else None, mask)
    if mask is None:
        return None
    return mask.dense(q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=q.device, offset=offset)


def scores(
    q: Query, k: Key, *, scale: float | None = None, bias: Tensor | Bias | None = None, offset: int = 0
) -> Weights:
    """q k^T * scale + bias, scale 1/sqrt(dim) unless given."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = (q * scale) @ repeat_heads(k, q.shape[1]).transpose(-1, -2)
    return s if bias is None else s + dense_bias(bias, q, k, offset)


def dense_bias(bias: Tensor | Bias, q: Query, k: Key, offset: int = 0) -> Float[Tensor, "#batch #heads n m"]:
    if isinstance(bias, Tensor):
        return bias.to(q.dtype)
    i = torch.arange(offset, offset + q.shape[2], device=q.device).view(-1, 1)
    return bias.bias(i, torch.arange(k.shape[2], device=q.device)).unsqueeze(0).to(q.dtype)


def weights(
    q: Query,
    k: Key,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | Bias | None = None,
    normaliser: Normaliser = softmax,
    offset: int = 0,
) -> Weights:
    """The attention matrix: normaliser(q k^T * scale + bias) over the visible keys."""
    return normaliser(scores(q, k, scale=scale, bias=bias, offset=offset), visible(q, k, mask, causal, offset))


def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | Bias | None = None,
    normaliser: Normaliser = softmax,
    offset: int = 0,
) -> Float[Tensor, "batch heads n value_dim"]:
    """weights(q, k) @ v by the fastest exact way.

    Args:
        q, k, v: (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, value_dim); heads is a
            multiple of kv_heads.
        causal: query i (at position offset + i) reads keys j <= offset + i.
        bias: added to the scores before the normaliser.
    """
    how = {"mask": mask, "causal": causal, "scale": scale, "bias": bias, "offset": offset}
    if forced() == "reference":
        return weights(q, k, normaliser=normaliser, **how) @ repeat_heads(v, q.shape[1])  # type: ignore[arg-type]
    if normaliser is softmax and not _learned(bias):
        return _sdpa(q, k, v, mask, causal, scale, bias, offset)
    return _chunked(q, k, v, mask, causal, scale, bias, offset, normaliser)


def _learned(bias: Tensor | Bias | None) -> bool:
    """Whether the bias gets a gradient, for which `scaled_dot_product_attention` writes the whole matrix out."""
    if bias is None or not torch.is_grad_enabled():
        return False
    return bias.requires_grad if isinstance(bias, Tensor) else any(p.requires_grad for p in bias.parameters())


def _sdpa(q, k, v, mask, causal, scale, bias, offset):
    more, value_dim = v.shape[3] - q.shape[3], v.shape[3]
    if more:  # kernels want one width, and zeros change nothing
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        if more > 0:
            q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
        else:
            v = F.pad(v, (0, -more))
    is_causal, keep, rest = masks.split(mask)
    causal = causal or is_causal
    if causal and offset + 1 >= k.shape[2]:
        causal = False  # a single query at the end reads everything
    heads, kv_heads, grouped = q.shape[1], k.shape[1], False
    if heads != kv_heads:
        # SDPA's grouped backward on a CPU works on a key head a thread: with fewer of them, threads would idle.
        grouped = not torch.is_grad_enabled() or (not q.is_cuda and len(k) * kv_heads >= _threads())
        if not grouped:
            k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    alone = rest is None and keep is None and bias is None
    if causal and alone and offset and _After.serves(q, k, v, offset):
        return _After.apply(q, k, v, offset, scale)[..., :value_dim]
    attn_mask = None
    if rest is not None or bias is not None or (causal and (keep is not None or offset)):
        attn_mask, causal = visible(q, k, mask, causal, offset), False
        if bias is not None:
            attn_bias = dense_bias(bias, q, k, offset)
            attn_mask = attn_bias if attn_mask is None else attn_bias.masked_fill(~attn_mask, -math.inf)
    elif keep is not None:
        attn_mask = keep[:, None, None, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y[..., :value_dim]


class _After(torch.autograd.Function):
    """Causal attention of queries after ``offset`` other keys on a CPU, whose kernel counts queries from the first key
    on and would ask for the whole matrix as a mask: all of the keys before, and the causal part, joined by their
    log-sum-exps. With those of the whole rows, the kernel's backward pass gives each part's share of the gradient."""

    @staticmethod
    def serves(q: Query, k: Key, v: Value, offset: int) -> bool:
        same = q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled("cpu")
        return same and q.device.type == "cpu" and 1 < q.shape[2] == k.shape[2] - offset

    @staticmethod
    def parts(n: int, offset: int) -> Iterator[tuple[slice, slice, bool]]:
        """Queries, the keys that they read, and whether those are their own: some queries at a time, as the kernel
        skips nothing inside its blocks."""
        rows = max(256, -(-n // 4))
        for start in range(0, n, rows):
            now, after = slice(start, min(start + rows, n)), offset + start
            yield now, slice(0, after), False
            yield now, slice(after, offset + now.stop), True

    @staticmethod
    def forward(ctx: Any, q: Query, k: Key, v: Value, offset: int, scale: float | None) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found: list[tuple[Tensor, Tensor]] = []
        for now, keys, own in _After.parts(q.shape[2], offset):
            y, lse = attend(q[:, :, now], k[:, :, keys], v[:, :, keys], 0.0, own, scale=scale)
            if own:
                before, before_lse = found.pop()
                lse, own_lse = torch.logaddexp(before_lse, lse), lse
                y = torch.lerp(before, y, (own_lse - lse).exp()[..., None].to(q.dtype))
            found.append((y, lse))
        # As queries lie, so that heads are joined without a copy.
        out = torch.cat([y.transpose(1, 2) for y, _ in found], 1).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.cat([lse for _, lse in found], 2))
        ctx.offset, ctx.scale = offset, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        share = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        by_q, by_k, by_v = (torch.zeros_like(t) for t in (q, k, v))
        for now, keys, own in _After.parts(q.shape[2], ctx.offset):
            given = grad[:, :, now], q[:, :, now], k[:, :, keys], v[:, :, keys], out[:, :, now], lse[:, :, now]
            parts = share(*given, 0.0, own, scale=ctx.scale)
            for total, at, part in zip((by_q, by_k, by_v), (now, keys, keys), parts, strict=True):
                total[:, :, at] += part
        return by_q, by_k, by_v, None, None


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _chunked(q, k, v, mask, causal, scale, bias, offset, normaliser):
    causal = causal or masks.split(mask)[0]
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])

    def part(start: int, stop: int) -> Tensor:
        # Causal queries never read past the last one of their chunk.
        m = min(k.shape[2], offset + stop) if causal else k.shape[2]
        b = bias
        if isinstance(b, Tensor):
            b = (b if b.shape[-2] == 1 else b[..., start:stop, :])[..., :m]
        how = {"mask": mask, "causal": causal, "scale": scale, "bias": b, "offset": offset + start}
        return weights(q[:, :, start:stop], k[:, :, :m], normaliser=normaliser, **how) @ v[:, :, :m]

    return by_rows(part, q.shape[2], q.shape[0] * q.shape[1] * k.shape[2])


def by_rows(part: Callable[[int, int], Tensor], n: int, row: int) -> Float[Tensor, "batch heads n value_dim"]:
    """part(start, stop) of the queries start to stop, joined: as many queries at a time as `CHUNK` elements allow at
    ``row`` elements a query, recomputed in the backward pass where that takes several chunks."""
    rows = max(1, CHUNK // row)
    if rows >= n:
        return part(0, n)
    spans = [(start, min(start + rows, n)) for start in range(0, n, rows)]
    if torch.is_grad_enabled():
        parts = [checkpoint(part, *span, use_reentrant=False, preserve_rng_state=False) for span in spans]
    else:
        parts = [part(*span) for span in spans]
    return torch.cat(parts, 2)
