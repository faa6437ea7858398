"""Deconstructed attention: what the weights of each variant know, and what they do not."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight import testing
from crosslight.errors import CrosslightError

DIM, HEADS, N = 8, 2, 6


def made(variant: str, **options) -> nn.Module:
    return crosslight.create("deconstructing-attention", dim=DIM, heads=HEADS, variant=variant, **options).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


def plain(attn) -> nn.Module:
    """PyTorch's attention with the weights of ours."""
    other = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        other.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        other.out_proj.load_state_dict(attn.out.state_dict())
    return other


ABOVE = torch.ones(N, N).triu(1).bool()


def test_standard_is_multi_head_attention(x):
    attn = made("standard")
    torch.testing.assert_close(attn(x, causal=True), plain(attn)(x, x, x, attn_mask=ABOVE)[0])


def test_fixed_takes_queries_and_keys_from_the_sequence(x):
    attn = made("fixed", max_length=9)
    s = attn.sequence[:N].expand(2, -1, -1)
    torch.testing.assert_close(attn(x, causal=True), plain(attn)(s, s, x, attn_mask=ABOVE)[0])


def test_scored_by_takes_queries_and_keys_from_the_stream(x):
    attn, s = made("standard"), torch.randn(2, N, DIM, dtype=torch.double)
    before = attn(x)
    with attn.scored_by(s):
        torch.testing.assert_close(attn(x, causal=True), plain(attn)(s, s, x, attn_mask=ABOVE)[0])
    assert torch.equal(attn(x), before)


def test_uniform_is_the_mean_of_what_may_be_read(x):
    attn = made("uniform")
    v = attn.v(x)
    past = v.cumsum(1) / torch.arange(1, N + 1).view(-1, 1)
    torch.testing.assert_close(attn(x), attn.out(v.mean(1, keepdim=True).expand_as(v)))
    torch.testing.assert_close(attn(x, causal=True), attn.out(past))


@pytest.mark.parametrize("variant", ["fixed", "uniform", "standard"])
def test_rows_sum_to_one_and_only_standard_weights_know_the_states(variant, x):
    attn = made(variant)
    weights, other = attn.weights(x, causal=True), attn.weights(torch.randn_like(x), causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, N).double())
    assert (weights.triu(1) == 0).all()
    assert torch.equal(weights, other) == (variant != "standard")


@pytest.mark.parametrize("frozen", [True, False])
def test_static_weights_know_the_tokens_but_not_their_states(frozen, x):
    """StaticEmbQK and RndEmbQK: the same in two layers with the same W_q and W_k, another with another token."""
    table, ids = nn.Embedding(10, DIM).double().requires_grad_(not frozen), torch.randint(1, 10, (2, N))
    first, second = made("standard"), made("standard")
    second.q, second.k = first.q, first.k
    with first.scored_by(table(ids)), second.scored_by(table(ids)):
        weights = first.weights(x)
        assert torch.equal(second.weights(first(x)), weights)
    ids[:, 2] = 0
    with first.scored_by(table(ids)):
        assert not torch.allclose(first.weights(x), weights)


def test_decoding_scored_by_a_stream(x):
    attn, s = made("standard"), torch.randn(2, N, DIM, dtype=torch.double)
    cache, parts = None, []
    for i in range(N):
        with attn.scored_by(s[:, i : i + 1]):
            y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    with attn.scored_by(s):
        torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True))


def test_uniform_conforms():
    only = ["fast_path_equals_weights", "decoding_equals_full_pass", "empty_rows_are_zero", "parameters_learn"]
    testing.check("deconstructing-attention", options={"variant": "uniform"}, only=only)


def test_misuse_is_named(x):
    with pytest.raises(CrosslightError, match="variant: got 'fixed', expected 'standard'"), made("fixed").scored_by(x):
        pass
    attn = made("standard")
    wrong = r"stream: got \(2, 5, 8\), expected \(2, 6, 8\) as x"
    with attn.scored_by(x[:, :5]), pytest.raises(CrosslightError, match=wrong):
        attn(x)
    with pytest.raises(CrosslightError, match="at most max_length = 4"):
        made("fixed", max_length=4)(x)
