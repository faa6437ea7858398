"""The dense engine: SDPA and the query chunks are held equal to the plain matrix form."""

import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from crosslight.engines import dense, masks
from crosslight.engines.backend import backend
from crosslight.engines.positions import ALiBi, RelativeBias

HEADS, N, M, WIDTH = 4, 13, 17, 8
NORMALISERS = {
    "softmax": dense.softmax,
    "sigmoid": dense.sigmoid,
    "sigmoid with a fixed bias": partial(dense.sigmoid, bias=-2.0),
    "signed": dense.signed,
}
KEEP = torch.arange(M) < torch.tensor([[M], [5]])
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "causal as a mask": {"mask": masks.causal()},
    "scale": {"scale": 0.3},
    "key padding": {"mask": masks.keys(KEEP)},
    "causal with key padding": {"mask": masks.keys(KEEP), "causal": True},
    "window and sink": {"mask": masks.window(3) | masks.sink(2)},
    "pairs": {"mask": masks.Pairs(torch.rand(2, HEADS, N, M, generator=torch.Generator().manual_seed(0)) < 0.5)},
    "offset": {"causal": True, "offset": 4},
    "offset and window": {"causal": True, "offset": 4, "mask": masks.window(3)},
    "empty rows": {"mask": masks.keys(torch.zeros(2, M, dtype=torch.bool))},
    "bias tensor": {"bias": torch.randn(1, HEADS, N, M, dtype=torch.float64)},
    "bias tensor for each key": {"bias": torch.randn(2, 1, 1, M, dtype=torch.float64), "causal": True},
    "causal with bias tensor": {"bias": torch.randn(2, 1, N, M, dtype=torch.float64), "causal": True},
    "bias object": {"bias": ALiBi(HEADS).double()},
    "bias object, causal, offset": {"bias": ALiBi(HEADS).double(), "causal": True, "offset": 4},
    "bias and key padding": {"bias": ALiBi(HEADS).double(), "mask": masks.keys(KEEP)},
}


def heads(kv_heads: int = HEADS, n: int = N, m: int = M, **kind) -> list[torch.Tensor]:
    kind = {"dtype": torch.float64, "requires_grad": True} | kind
    return [torch.randn(2, h, length, WIDTH, **kind) for h, length in ((HEADS, n), (kv_heads, m), (kv_heads, m))]


def both(streams, how, of=()):
    """Output and gradients of the chosen way and of the reference."""
    for name in ("auto", "reference"):
        with backend(name):
            y = dense.attend(*streams, **how)
        yield y, *torch.autograd.grad(y.sin().sum(), [*streams, *of])


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [dense.CHUNK, 3 * 2 * HEADS * M, 1])
def test_chunks_equal_the_matrix_form(case, normaliser, chunk, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", chunk)
    for fast, slow in zip(*both(heads(), CASES[case] | {"normaliser": NORMALISERS[normaliser]}), strict=True):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_causal_queries_after_other_keys_need_no_matrix(kv_heads, scale, monkeypatch):
    monkeypatch.setattr(dense, "visible", None)  # which makes it
    q, k, v = streams = heads(kv_heads, m=N + 4)
    y = dense.attend(q, k, v, causal=True, offset=4, scale=scale)
    scores = q @ dense.repeat_heads(k, HEADS).mT * (WIDTH**-0.5 if scale is None else scale)
    weights = scores.masked_fill(torch.ones(N, N + 4, dtype=torch.bool).triu(5), -math.inf).softmax(-1)
    expected = weights @ dense.repeat_heads(v, HEADS)
    torch.testing.assert_close(y, expected)
    by = [torch.autograd.grad(out.sin().sum(), streams) for out in (y, expected)]
    torch.testing.assert_close(*by)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("normaliser", ["softmax", "sigmoid"])
def test_grouped_heads_equal_repeated_ones(kv_heads, normaliser, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", 1)
    q, k, v = heads(kv_heads)
    how = {"causal": True, "normaliser": NORMALISERS[normaliser]}
    repeated = dense.attend(q, dense.repeat_heads(k, HEADS), dense.repeat_heads(v, HEADS), **how)
    torch.testing.assert_close(dense.attend(q, k, v, **how), repeated)
    with torch.no_grad():  # enable_gqa
        torch.testing.assert_close(dense.attend(q, k, v, **how), repeated)


@pytest.mark.parametrize("normaliser", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [dense.CHUNK, 1])
def test_a_learned_bias_gets_its_gradient(normaliser, chunk, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", chunk)
    bias = RelativeBias(HEADS).double()
    how = {"bias": bias, "causal": True, "normaliser": NORMALISERS[normaliser]}
    (*fast, learned), (*slow, expected) = both(heads(m=N), how, of=[bias.table])
    assert expected.abs().max() > 0
    torch.testing.assert_close(learned, expected)
    torch.testing.assert_close(fast, slow)


def test_chunks_keep_no_weights(monkeypatch):
    """Between forward and backward no weights stay alive, which in one piece they do."""
    alive = []

    def normaliser(scores, keep):
        weights = dense.sigmoid(scores, keep)
        alive.append(weakref.ref(weights))
        return weights

    for chunk, kept in ((dense.CHUNK, 1), (2 * HEADS * M, 0)):
        monkeypatch.setattr(dense, "CHUNK", chunk)
        alive.clear()
        y = dense.attend(*heads(), normaliser=normaliser)
        assert sum(ref() is not None for ref in alive) == kept
        y.sum().backward()


def test_chunks_compile(monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", 5 * 2 * HEADS * M)
    streams = heads()
    torch._dynamo.reset()
    compiled = torch.compile(dense.attend, fullgraph=True, backend="aot_eager")
    how = {"causal": True, "normaliser": dense.sigmoid}
    y = compiled(*streams, **how)
    torch.testing.assert_close(y, dense.attend(*streams, **how))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), streams), torch.autograd.grad(dense.attend(*streams, **how).sum(), streams)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_is_sdpa(causal):
    q, k, v = heads(m=N)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(dense.attend(q, k, v, causal=causal), expected)
    torch.testing.assert_close(dense.weights(q, k, causal=causal) @ v, expected)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_normalisers_give_zero_where_nothing_may_be_read(normaliser):
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[False, False, False], [True, False, True]])
    weights = NORMALISERS[normaliser](scores, keep)
    assert (weights[~keep] == 0).all()
    assert (weights[keep] != 0).all()
    (gradient,) = torch.autograd.grad(weights.sin().sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~keep] == 0).all()


def test_sigmoid_counts_the_keys_of_each_row():
    scores = torch.randn(3, 5, dtype=torch.float64)
    keep = torch.ones(3, 5, dtype=torch.bool).tril(1)
    rows = [torch.sigmoid(scores[i, : i + 2] - math.log(i + 2)) for i in range(3)]
    expected = torch.stack([F.pad(row, (0, 5 - len(row))) for row in rows])
    torch.testing.assert_close(dense.sigmoid(scores, keep), expected)
    torch.testing.assert_close(dense.sigmoid(scores, None), torch.sigmoid(scores - math.log(5)))
