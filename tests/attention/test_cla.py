"""Cross-layer attention: what is shared, what is saved, and that a group is its layers with the same W_k and W_v."""

import pytest
import torch

import crosslight
from crosslight.attention.cla import CrossLayerAttention
from crosslight.errors import CrosslightError

DIM, HEADS, N = 32, 4, 9


def first(**options):
    return crosslight.create("cla", **{"dim": DIM, "heads": HEADS, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


def whole(leader, layer):
    """The layer as one that makes the leader's keys and values by itself."""
    full = first(kv_heads=leader.kv_heads)
    full.position = layer.position
    full.load_state_dict(leader.state_dict() | layer.state_dict())
    return full


def run(layers, x):
    """A residual stack; also how many keys and values were made."""
    made = []
    for layer in layers:
        if layer.leads:
            made.append(layer.share(x))
        x = x + layer(x, made[-1], causal=True)
    return x, made


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_the_first_layer_is_grouped_attention(kv_heads, position, x):
    attn = first(kv_heads=kv_heads, position=position)
    plain = crosslight.create("softmax", dim=DIM, heads=HEADS, kv_heads=kv_heads, position=position).double()
    plain.load_state_dict(attn.state_dict())
    torch.testing.assert_close(attn(x, causal=True), plain(x, causal=True))
    torch.testing.assert_close(attn(x, attn.share(x), causal=True), plain(x, causal=True))


@pytest.mark.parametrize("position", [None, "rope", "relative"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_follower_reads_the_first_layers_keys_and_values(position, causal, x):
    leader = first(position=position)
    layer, later = leader.follower(), torch.randn_like(x)
    mask = torch.arange(N) < torch.tensor([[N], [5]])
    y = layer(later, leader.share(x), mask=mask, causal=causal)
    full = whole(leader, layer)
    q, k, v = full._queries(later), full._keys(x), full._values(x)
    extra = {}
    if position == "rope":
        q, k = full.position.rotate(q), full.position.rotate(k)
    elif position:
        extra["bias"] = full.position
    keep = crosslight.engines.masks.keys(mask)
    torch.testing.assert_close(y, full._merge(full.core(q, k, v, mask=keep, causal=causal, **extra), later))
    weights = layer.weights(later, leader.share(x), mask=mask, causal=causal)
    torch.testing.assert_close(layer.read(weights, later, leader.share(x), mask=mask, causal=causal), y)


def test_a_group_may_share_a_context(x):
    leader, context = first(context_dim=12), torch.randn(2, 6, 12, dtype=torch.double)
    layer, mask = leader.follower(), torch.arange(6) < torch.tensor([[6], [2]])
    shared = leader.share(x, context)
    torch.testing.assert_close(leader(x, shared, mask=mask), leader(x, context, mask=mask))
    assert layer.weights(x, shared, mask=mask).shape == (2, HEADS, N, 6)
    # Causal cross-attention sees all of the context.
    torch.testing.assert_close(layer(x, shared, causal=True), layer(x, shared))


def test_groups_of_one_are_the_base_attention(x):
    layers = CrossLayerAttention.stack(3, share=1, dim=DIM, heads=HEADS).double()
    y = x
    for layer in layers:
        y = y + layer(y, causal=True)
    torch.testing.assert_close(run(layers, x)[0], y)


@pytest.mark.parametrize(("depth", "share"), [(4, 2), (5, 2), (7, 3), (3, 1)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_is_saved(depth, share, kv_heads, x):
    options = {"dim": DIM, "heads": HEADS, "kv_heads": kv_heads, "bias": False}
    layers = CrossLayerAttention.stack(depth, share=share, **options).double()
    plain = depth * sum(p.numel() for p in crosslight.create("softmax", **options).parameters())
    groups = -(-depth // share)
    saved = (depth - groups) * 2 * DIM * kv_heads * (DIM // HEADS)
    assert plain - sum(p.numel() for p in layers.parameters()) == saved
    made = run(layers, x)[1]
    assert len(made) == groups
    elements = sum(kv.keys.numel() + kv.values.numel() for kv in made)
    assert elements == groups * 2 * kv_heads * (DIM // HEADS) * 2 * N


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_decoding_with_one_cache_a_group_equals_the_full_pass(position, x):
    layers = CrossLayerAttention.stack(5, share=2, dim=DIM, heads=HEADS, position=position).double()
    caches = [None] * 3
    parts = []
    for t in range(N):
        y = x[:, t : t + 1]
        for i, layer in enumerate(layers):
            step, caches[i // 2] = layer.step(y, caches[i // 2])
            y = y + step
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), run(layers, x)[0])
    assert all(cache.length == N for cache in caches)


def test_decoding_over_a_shared_context(x):
    leader, context = first(position="rope"), torch.randn(2, 6, DIM, dtype=torch.double)
    layer, cache, parts = leader.follower(), None, []
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    for t in range(N):
        _, cache = leader.step(x[:, t : t + 1], cache, **({} if t else {"context": context, "mask": mask}))
        parts.append(layer.step(x[:, t : t + 1], cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, leader.share(x, context), mask=mask, causal=True))


def test_gradients_reach_the_first_layer_through_its_followers(x):
    leader = first()
    leader.follower()(x, leader.share(x), causal=True).sum().backward()
    assert leader.k.weight.grad.abs().sum() > 0
    assert leader.v.weight.grad.abs().sum() > 0
    assert leader.q.weight.grad is None


def test_wrong_use_is_named(x):
    leader = first()
    layer = leader.follower()
    with pytest.raises(CrosslightError, match="context: got None, expected what `share`"):
        layer(x)
    with pytest.raises(CrosslightError, match="context: got a tensor, expected what `share`"):
        layer(x, x)
    with pytest.raises(CrosslightError, match="context: got shared keys"):
        layer(x[:1], leader.share(x))
    with pytest.raises(CrosslightError, match="share: got a follower"):
        layer.share(x)
    with pytest.raises(CrosslightError, match="cache: got None"):
        layer.step(x[:, :1])
    with pytest.raises(CrosslightError, match="mask"):
        layer(x, leader.share(x), mask=torch.ones(2, N + 1, dtype=torch.bool))
