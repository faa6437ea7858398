"""Superlinear attention: search, spans, window and gate written out, and the invariants of its row."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.superlinear_attention import SpanAttention
from crosslight.engines import masks, sparse
from crosslight.errors import CrosslightError


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def qkv(n, heads=4, kv_heads=2, dim=8):
    shapes = [(heads, 2 * dim), (kv_heads, dim), (kv_heads, dim)]
    return [torch.randn(2, h, n, d, dtype=torch.float64).requires_grad_() for h, d in shapes]


def by_hand(q, k, keep, core):
    """The matrix of one head."""
    n, d = k.shape
    a = torch.zeros(n, n, dtype=q.dtype)
    window = (core.sw_index + 1) ** 2 - 1
    for t in range(n):
        anchors, i = [], core.sw_index + 1
        while t - i * i + 1 >= 0:
            if keep[t - i * i + 1]:
                anchors.append((float(q[t, :d].detach() @ k[t - i * i + 1].detach()), t - i * i + 1))
            i += 1
        near = [j for j in range(max(0, t - window + 1), t + 1) if keep[j]]
        rows, scores = [], []
        for _, anchor in sorted(anchors, reverse=True)[: core.topk]:
            unit = math.sqrt(t + 1)
            low = max(0, anchor - math.ceil(core.backward_factor * unit))
            high = min(anchor + math.ceil(core.forward_factor * unit), t - window)
            seen = [j for j in range(low, high + 1) if keep[j]] + near
            rows.append((seen, (k[seen] @ q[t, d:] / d**0.5).softmax(0)))
            scores.append(q[t, :d] @ k[anchor])
        if not rows and near:
            rows, scores = [(near, (k[near] @ q[t, d:] / d**0.5).softmax(0))], [q.new_zeros(())]
        if rows:
            for (seen, row), gate in zip(rows, torch.stack(scores).softmax(0), strict=True):
                a[t] = a[t].index_add(0, torch.tensor(seen), gate * row)
    return a


@pytest.mark.parametrize("options", [{}, {"sw_index": 1, "topk": 3, "backward": 0.5, "forward": 0.0}, {"sw_index": 0}])
@pytest.mark.parametrize(("n", "masked"), [(60, False), (60, True), (7, False)])
def test_equals_the_algorithm_written_out(options, n, masked):
    q, k, v = qkv(n)
    core = SpanAttention(4, 8, **options)
    keep = torch.rand(2, n) < 0.7 if masked else torch.ones(2, n, dtype=torch.bool)
    mask = masks.keys(keep) if masked else None
    a = torch.stack([torch.stack([by_hand(q[b, h], k[b, h // 2], keep[b], core) for h in range(4)]) for b in range(2)])
    torch.testing.assert_close(core.weights(q, k, mask=mask), a)
    y, expected = core(q, k, v, mask=mask), a @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(y, expected)
    goal = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(t, (q, k, v), goal) for t in (y, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert (got[0][..., :8].abs().amax() > 0) == (n > 9 or options.get("sw_index") == 0)  # the router learns


def test_stripes_and_window():
    """Anchors are t - i^2 + 1 for i > w, all in the sequence, and the window ends where the first of them begins."""
    core = SpanAttention(1, 8, sw_index=3)
    assert core.window == 15
    assert core.stripes(100) == [i * i - 1 for i in range(4, 11)]
    assert core.stripes(15) == []
    assert SpanAttention(1, 8, sw_index=65, search_power=0.55).window == 2032  # the release's example
    assert SpanAttention(1, 8, sw_index=1, search_power=1 / 3).stripes(70) == [7, 26, 63]


@pytest.mark.parametrize("t", [20, 99, 1000, 4097])
def test_no_position_is_left_out(t):
    """All stripes of a token together, with spans of two units backward, cover the past up to the window."""
    core = SpanAttention(1, 8, sw_index=2, backward=2.0, forward=0.0)
    anchors = t - torch.tensor(core.stripes(t + 1))
    first, last = core.spans(anchors.view(1, 1, 1, -1), offset=t)
    reached = torch.zeros(t + 1, dtype=torch.bool)
    reached[t - core.window + 1 :] = True
    for low, high in zip(first.flatten().tolist(), last.flatten().tolist(), strict=True):
        reached[low : high + 1] = True
    assert reached.all()


def test_one_span_that_holds_the_past_is_causal_softmax():
    q, k, v = qkv(50, kv_heads=4)
    core = SpanAttention(4, 8, topk=1, backward=100.0, forward=100.0)
    expected = F.scaled_dot_product_attention(q[..., 8:], k, v, is_causal=True)
    torch.testing.assert_close(core(q, k, v), expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding(kv_heads):
    options = {"sw_index": 1, "backward": 0.5, "position": "rope"}
    attn = crosslight.create("superlinear-attention", dim=32, heads=4, kv_heads=kv_heads, **options).double()
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    for i in range(37):
        y, cache = attn.step(x[:, i : i + 1], cache)
        torch.testing.assert_close(y[:, 0], expected[:, i])
    start, cache = attn.step(x[:, :30])
    torch.testing.assert_close(start, expected[:, :30])
    torch.testing.assert_close(attn.step(x[:, 30:31], cache)[0][:, 0], expected[:, 30])


def test_the_search_is_the_same_in_chunks(monkeypatch):
    q, k, _ = qkv(200)
    core = SpanAttention(4, 8, sw_index=1)
    whole = core.search(q[..., :8], k, None)
    monkeypatch.setattr("crosslight.attention.superlinear_attention.CHUNK", 2000)
    assert torch.equal(core.search(q[..., :8], k, None), whole)


def test_work_grows_below_quadratic():
    from crosslight.testing import flops

    def work(n):
        core = SpanAttention(1, 16, backward=1.0, forward=0.0)
        return flops.measure(lambda: core(*(torch.randn(1, 1, n, d, requires_grad=True) for d in (32, 16, 16))))

    small, large = work(1024), work(4096)
    assert flops.growth(small.flops, large.flops, 4) < 1.65
    assert large.largest < 4096**2 / 8


def test_bad_options_are_refused():
    wrong = {"topk": 0, "sw_index": -1, "search_power": 1.0, "span_power": 0.0, "backward": -1.0, "forward": -1.0}
    for name, value in wrong.items():
        with pytest.raises(CrosslightError, match=name):
            crosslight.create("superlinear-attention", dim=16, heads=2, **{name: value})
