"""Merged attention: one softmax over past and context, parity with transformers, the mask of two parts, the cache."""

import random

import pytest
import torch

import crosslight
from crosslight.attention.base import How
from crosslight.attention.t5gemma2_merged_attention import Beside
from crosslight.engines import masks
from crosslight.engines.plans import block_table
from crosslight.errors import CrosslightError

N, M = 9, 6


def make(**options):
    return crosslight.create("t5gemma2-merged-attention", **{"dim": 16, "heads": 4, **options}).double()


def streams(n: int = N, m: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, n, 16, dtype=torch.double), torch.randn(2, m, 16, dtype=torch.double)


@pytest.mark.parametrize("window", [None, 4])
def test_parity_with_transformers(window):
    pytest.importorskip("transformers")
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2MergedAttention

    config = T5Gemma2DecoderConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention" if window else "full_attention"],
        attn_implementation="eager",
    )
    config._attn_implementation = "eager"
    theirs = T5Gemma2MergedAttention(config, 0).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = make(kv_heads=2, head_dim=8, window=window).float()
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
    ours.load_state_dict({f"{a}.weight": theirs.state_dict()[f"{b}.weight"] for a, b in names.items()})
    x, context = (t.float() for t in streams())
    keep = torch.arange(M) < torch.tensor([[M], [4]])
    angles = torch.arange(N)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.cat([angles, angles], -1)[None]
    distance = torch.arange(N)[:, None] - torch.arange(N)
    own = (distance >= 0) & (distance < (window or N))
    allowed = torch.cat([own.expand(2, N, N), keep[:, None].expand(2, N, M)], -1)[:, None]
    additive = torch.zeros(2, 1, N, N + M).masked_fill(~allowed, torch.finfo(torch.float32).min)
    result = theirs(x, (angles.cos(), angles.sin()), additive, context)
    torch.testing.assert_close(ours(x, context, mask=keep, causal=True), result[0], atol=1e-5, rtol=1e-5)
    joint = ours.joint(x, context, mask=keep, causal=True)
    torch.testing.assert_close(joint, torch.cat(result[1:], -1), atol=1e-5, rtol=1e-5)


def test_rows_over_both_parts_sum_to_one():
    attn, (x, context) = make(), streams()
    for causal in (False, True):
        joint = attn.joint(x, context, causal=causal)
        assert joint.shape == (2, 4, N, N + M)
        torch.testing.assert_close(joint.sum(-1), torch.ones(2, 4, N, dtype=torch.double))
        torch.testing.assert_close(attn.weights(x, context, causal=causal), joint[..., N:])


def test_without_a_context_it_is_causal_self_attention():
    attn, (x, context) = make(), streams()
    empty = torch.zeros(2, M, dtype=torch.bool)
    torch.testing.assert_close(attn(x, context, mask=empty, causal=True), attn(x, causal=True))
    # and with queries and keys that are not normalised, the plain one
    plain = crosslight.create("softmax", dim=16, heads=4, bias=False, position="rope").double()
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if "norm" not in k})
    attn.q_norm = attn.k_norm = torch.nn.Identity()
    torch.testing.assert_close(attn(x, causal=True), plain(x, causal=True))


def test_the_order_of_the_context_does_not_matter():
    attn, (x, context) = make(), streams()
    order = torch.randperm(M)
    torch.testing.assert_close(attn(x, context[:, order], causal=True), attn(x, context, causal=True))
    turned = torch.randperm(N)
    assert (attn(x[:, turned], context) - attn(x, context)[:, turned]).abs().max() > 1e-4


def test_half_the_parameters_of_self_and_cross():
    plain = crosslight.create("softmax", dim=16, heads=4, bias=False)
    norms = 2 * 4
    assert sum(p.numel() for p in make().parameters()) - norms == sum(p.numel() for p in plain.parameters())


def test_a_window_hides_the_past_and_no_context():
    joint = make(window=3).joint(*streams(), causal=True)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    assert torch.equal((joint[..., :N] > 0)[0, 0], (distance >= 0) & (distance < 3))
    assert (joint[..., N:] > 0).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cross", [False, True])
def test_decoding_and_what_it_carries(window, cross):
    attn, (x, context) = make(window=window), streams(20)
    keep = torch.arange(M) < torch.tensor([[M], [4]])
    how = {"context": context, "mask": keep} if cross else {}
    parts, cache, held = [], None, []
    with torch.no_grad():
        for i in range(20):
            y, cache = attn.step(x[:, i : i + 1], cache, **(how if i == 0 else {}))
            parts.append(y)
            held.append(cache.own.length)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True, **how))
    assert max(held) == (20 if window is None else 2 * window - 1)


def rule(draw: random.Random, n: int, m: int) -> masks.Mask | None:
    return draw.choice(
        [
            None,
            masks.causal(),
            masks.causal() & masks.window(2),
            masks.sink(2),
            masks.keys(torch.rand(2, m) < 0.5),
            masks.Pairs(torch.rand(2, 3, n, m) < 0.5),
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_of_two_parts_and_its_blocks(seed):
    draw = random.Random(seed)
    first, second, sizes = rule(draw, 13, 8), rule(draw, 13, 7), [8, 7]
    parts = [
        torch.ones(2, 3, 13, m, dtype=torch.bool) if r is None else r.dense(2, 3, 13, m).expand(2, 3, 13, m)
        for r, m in zip((first, second), sizes, strict=True)
    ]
    mask, keep = Beside(8, first, second), torch.cat(parts, -1)
    assert torch.equal(mask.dense(2, 3, 13, 15).expand(2, 3, 13, 15), keep)
    text, tensors = masks.pack(mask)
    assert torch.equal(masks.unpack(text, tensors).dense(2, 3, 13, 15).expand(2, 3, 13, 15), keep)
    for size in (1, 3, 4):
        some, every = block_table(mask, 13, 15, size, size)
        for a, b in torch.cartesian_prod(torch.arange(some.shape[0]), torch.arange(some.shape[1])).tolist():
            block = keep[..., a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert some[a, b] or not block.any()
            assert block.all() or not every[a, b]


def test_softmax_takes_the_mask():
    plain, (x, context) = crosslight.create("softmax", dim=16, heads=4).double(), streams(N, 2 * N)
    mask = Beside(N, masks.causal(), masks.window(1))
    joint = plain.weights(x, context, mask=mask)
    torch.testing.assert_close(
        joint @ plain._values(context), plain.core(*plain._heads(x, context, How(cross=True)), mask=mask)
    )
    assert (joint[..., :N].triu(1) == 0).all()
    assert (joint[..., N:].triu(2) == 0).all()


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="window: got 0"):
        make(window=0)
    with pytest.raises(CrosslightError, match="position"):
        make(position="alibi")
