"""Softmax attention against torch.nn.MultiheadAttention, SDPA and transformers' Llama, with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crosslight
from crosslight.engines import masks

DIM, HEADS = 16, 4


def pair(context_dim: int = DIM) -> tuple[nn.MultiheadAttention, nn.Module]:
    """torch's layer and ours, with the same weights."""
    theirs = nn.MultiheadAttention(DIM, HEADS, kdim=context_dim, vdim=context_dim, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = crosslight.create("softmax", dim=DIM, heads=HEADS, context_dim=context_dim)
    packed = theirs.in_proj_weight
    q, k, v = (
        packed.chunk(3) if packed is not None else (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    )
    with torch.no_grad():
        for layer, weight, bias in zip((ours.q, ours.k, ours.v), (q, k, v), theirs.in_proj_bias.chunk(3), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    return theirs.double(), ours.double()


@pytest.mark.parametrize("context_dim", [None, DIM, 10])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_multihead_attention(context_dim, padded, causal):
    theirs, ours = pair(context_dim or DIM)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    z = None if context_dim is None else torch.randn(2, 9, context_dim, dtype=torch.float64)
    m = 7 if z is None else 9
    keep = torch.arange(m) < torch.tensor([[m], [4]]) if padded else None
    upper = torch.ones(7, m, dtype=torch.bool).triu(1) if causal and z is None else None
    expected, weights = theirs(
        x,
        x if z is None else z,
        x if z is None else z,
        key_padding_mask=None if keep is None else ~keep,
        attn_mask=upper,
        average_attn_weights=False,
    )
    torch.testing.assert_close(ours(x, z, mask=keep, causal=causal), expected)
    torch.testing.assert_close(ours.weights(x, z, mask=keep, causal=causal), weights)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_equal_sdpa_enable_gqa(kv_heads, causal):
    attn = crosslight.create("softmax", dim=DIM, heads=HEADS, kv_heads=kv_heads)
    x = torch.randn(2, 7, DIM)
    q = attn.q(x).view(2, 7, HEADS, 4).transpose(1, 2)
    k, v = (layer(x).view(2, 7, kv_heads, 4).transpose(1, 2) for layer in (attn.k, attn.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(attn(x, causal=causal), attn.out(y.transpose(1, 2).flatten(2)))


def test_rope_equals_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, attn_implementation="sdpa"
    )
    theirs = llama.LlamaAttention(config, 0)
    ours = crosslight.create("softmax", dim=DIM, heads=HEADS, kv_heads=2, bias=False, position="rope")
    for own, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        getattr(ours, own).load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, 9, DIM)
    rotation = llama.LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    expected = theirs(x, rotation, None)[0]
    torch.testing.assert_close(ours(x, causal=True), expected)
    with torch.no_grad():
        cache, steps = None, []
        for i in range(9):
            y, cache = ours.step(x[:, i : i + 1], cache)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), expected)


@pytest.mark.parametrize("position", ["rope", "alibi", "relative"])
@pytest.mark.parametrize("cross", [False, True])
def test_decoding_keeps_positions(position, cross):
    attn = crosslight.create("softmax", dim=DIM, heads=HEADS, position=position).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    z = torch.randn(2, 5, DIM, dtype=torch.float64) if cross else None
    cache, steps = None, []
    for i in range(7):
        y, cache = attn.step(x[:, i : i + 1], cache, context=z if i == 0 else None)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), attn(x, z, causal=True))


@pytest.mark.parametrize("position", ["rope", "alibi", "relative"])
@pytest.mark.parametrize("causal", [False, True])
def test_fast_path_equals_weights_with_positions(position, causal):
    attn = crosslight.create("softmax", dim=DIM, heads=HEADS, position=position).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    keep = torch.arange(7) < torch.tensor([[7], [3]])
    for mask in (None, keep, masks.window(2) | masks.sink(1)):
        weights = attn.weights(x, mask=mask, causal=causal)
        torch.testing.assert_close(attn.read(weights, x), attn(x, mask=mask, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [9, 300])
def test_a_window_mask_is_the_band_matrix(length, causal):
    """Also at a length where the sparse engine takes over."""
    attn = crosslight.create("softmax", dim=DIM, heads=HEADS).double()
    x = torch.randn(1, length, DIM, dtype=torch.float64)
    distance = torch.arange(length).view(-1, 1) - torch.arange(length)
    band = (distance.abs() <= 3) & ((distance >= 0) | torch.tensor(not causal))
    y = attn(x, mask=masks.window(3), causal=causal)
    torch.testing.assert_close(y, attn(x, mask=band.view(1, length, length)))
    weights = attn.weights(x, mask=masks.window(3), causal=causal)
    assert torch.equal(weights[0, 0] != 0, band)
    torch.testing.assert_close(attn.read(weights, x), y)


def test_rows_of_weights_sum_to_one():
    attn = crosslight.create("softmax", dim=DIM, heads=HEADS)
    weights = attn.weights(torch.randn(2, 7, DIM), causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 7))
