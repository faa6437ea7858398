"""Multi-query attention: multi-head attention whose key and value heads are one."""

import pytest
import torch
import torch.nn.functional as F

import crosslight

DIM, HEADS, WIDTH = 24, 6, 4


@pytest.fixture
def attn():
    return crosslight.create("mqa", dim=DIM, heads=HEADS).double()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_multi_head_attention_with_one_head_repeated(attn, cross, causal):
    full = crosslight.create("softmax", dim=DIM, heads=HEADS).double()
    own = attn.state_dict()
    for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
        own[name] = torch.cat([own[name]] * HEADS)
    full.load_state_dict(own)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    z = torch.randn(2, 5, DIM, dtype=torch.float64) if cross else None
    torch.testing.assert_close(attn(x, z, causal=causal), full(x, z, causal=causal))
    torch.testing.assert_close(attn.weights(x, z, causal=causal), full.weights(x, z, causal=causal))


def test_equals_sdpa_with_one_key_value_head(attn):
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    q = attn.q(x).view(2, 7, HEADS, WIDTH).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, attn.k(x)[:, None], attn.v(x)[:, None], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attn(x, causal=True), attn.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("heads", [2, 6, 12])
def test_the_cache_does_not_grow_with_the_heads(heads):
    attn = crosslight.create("mqa", dim=DIM, heads=heads, head_dim=WIDTH)
    cache, n = None, 5
    with torch.no_grad():
        for _ in range(n):
            _, cache = attn.step(torch.randn(1, 1, DIM), cache)
    assert cache.state.nbytes == 2 * n * WIDTH * 4


def test_parameters_drop_by_two_projections_of_all_heads_but_one():
    def count(id: str) -> int:
        return sum(p.numel() for p in crosslight.create(id, dim=DIM, heads=HEADS, bias=False).parameters())

    assert count("softmax") - count("mqa") == 2 * DIM * WIDTH * (HEADS - 1)


def test_decoding_equals_the_full_pass_with_rope():
    attn = crosslight.create("mqa", dim=DIM, heads=HEADS, position="rope").double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    cache, steps = None, []
    with torch.no_grad():
        for i in range(9):
            y, cache = attn.step(x[:, i : i + 1], cache)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), attn(x, causal=True))


def test_kv_heads_between_one_and_all_is_grouped_query_attention():
    attn = crosslight.create("mqa", dim=DIM, heads=HEADS, kv_heads=2)
    assert attn.k.weight.shape == (2 * WIDTH, DIM)
    assert attn.card.id == "mqa"
