"""The minimal transformer's attention: products of matrices in one, symmetry, the convex hull, counts."""

import itertools

import pytest
import torch
from torch import nn

import crosslight
from crosslight import testing
from crosslight.errors import CrosslightError

DIM, N = 8, 6
SIMILARITIES, VALUES = ("full", "collapsed", "symmetric", "positive"), ("full", "collapsed", "none")


def made(similarity: str, values: str, heads: int = 2, dim: int = DIM) -> nn.Module:
    return crosslight.create("minimal-transformer", dim=dim, heads=heads, similarity=similarity, values=values).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


@pytest.mark.parametrize("heads", [1, 2])
def test_full_is_multi_head_attention(heads, x):
    attn = made("full", "full", heads)
    plain = nn.MultiheadAttention(DIM, heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        rows = [w.transpose(1, 2).flatten(0, 1) for w in (attn.w_q, attn.w_k, attn.w_v)]
        plain.in_proj_weight.copy_(torch.cat(rows))
        plain.out_proj.weight.copy_(attn.w_o.flatten(0, 1).T)
    torch.testing.assert_close(attn(x), plain(x, x, x)[0])


def test_collapsed_matrices_are_the_products(x):
    full, collapsed = made("full", "full"), made("collapsed", "collapsed")
    with torch.no_grad():
        collapsed.w.copy_(full.w_q @ full.w_k.mT)
        collapsed.w_vo.copy_(full.w_v @ full.w_o)
    torch.testing.assert_close(collapsed.weights(x), full.weights(x))
    torch.testing.assert_close(collapsed(x, causal=True), full(x, causal=True))


@pytest.mark.parametrize("similarity", ["symmetric", "positive"])
def test_similarity_is_symmetric(similarity, x):
    attn = made(similarity, "none")
    s = attn._queries(x) @ attn._keys(x).mT
    torch.testing.assert_close(s, s.mT)
    t = attn.triangle()
    assert (t.triu(1) == 0).all()
    assert (t.tril() != 0).sum() == 2 * DIM * (DIM + 1) // 2
    w = t + t.mT if similarity == "symmetric" else t @ t.mT
    torch.testing.assert_close(attn.weights(x), (x[:, None] @ w @ x[:, None].mT / (DIM // 2) ** 0.5).softmax(-1))
    if similarity == "positive":
        assert (s.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_without_values_the_output_lies_in_the_convex_hull(similarity, x):
    y = made(similarity, "none")(x)
    assert (y <= x.amax(1, keepdim=True)).all()
    assert (y >= x.amin(1, keepdim=True)).all()


@pytest.mark.parametrize("heads", [1, 4])
def test_parameters_are_the_closed_form(heads):
    d = DIM // heads
    first = {"full": 2 * DIM * d, "collapsed": DIM**2, "symmetric": DIM * (DIM + 1) // 2}
    first["positive"] = first["symmetric"]
    second = {"full": 2 * DIM * d, "collapsed": DIM**2, "none": 0}
    for similarity, values in itertools.product(SIMILARITIES, VALUES):
        count = sum(p.numel() for p in made(similarity, values, heads).parameters())
        assert count == heads * (first[similarity] + second[values])


@pytest.mark.parametrize(("similarity", "values"), itertools.product(SIMILARITIES, VALUES))
def test_every_form_decodes_as_it_attends(similarity, values, x):
    attn, z = made(similarity, values), torch.randn(2, 4, DIM, dtype=torch.double)
    for context in (None, z):
        cache, parts = None, []
        for i in range(N):
            y, cache = attn.step(x[:, i : i + 1], cache, context=context if i == 0 else None)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), attn(x, context, causal=True))
        torch.testing.assert_close(attn.read(attn.weights(x, context), x, context), attn(x, context))


@pytest.mark.parametrize("similarity", ["symmetric", "positive"])
def test_the_smallest_forms_conform(similarity):
    options = {"similarity": similarity, "values": "none"}
    only = ["gradients_are_exact", "empty_rows_are_zero", "causal_does_not_leak", "parameters_learn", "state_restores"]
    testing.check("minimal-transformer", options=options, only=only)


def test_the_cache_holds_the_tokens_alone(x):
    attn, cache = made("symmetric", "none"), None
    for i in range(N):
        _, cache = attn.step(x[:, i : i + 1], cache)
    assert cache.state.nbytes == x.numel() * x.element_size()


def test_a_symmetric_similarity_needs_equal_widths():
    with pytest.raises(CrosslightError, match="context_dim: got 6, expected dim = 8"):
        crosslight.create("minimal-transformer", dim=8, context_dim=6, similarity="symmetric")
