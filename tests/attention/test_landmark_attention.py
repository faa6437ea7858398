"""Landmark attention: the groups of the paper written out one by one, and retrieval against them."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.landmark_attention import LandmarkAttention, insert, remove
from crosslight.engines import masks, sparse
from crosslight.errors import CrosslightError


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def qkv(n, m=None, heads=2, kv_heads=2, dim=8):
    shapes = [(heads, n), (kv_heads, m or n), (kv_heads, m or n)]
    return [torch.randn(2, h, length, dim, dtype=torch.float64).requires_grad_() for h, length in shapes]


def by_hand(s, block, causal, cross=False, top_k=None):
    """A of one head's scores (n, m), row by row and group by group."""
    n, m = s.shape
    size, rows = block + 1, []
    for i in range(n):
        row = [s.new_zeros(()) for _ in range(m)]
        own = None if cross else i // size
        groups, direct = [], []
        for b in range((m + size - 1) // size):
            tokens = [j for j in range(b * size, min(b * size + block, m)) if not causal or j <= i]
            landmark = b * size + block
            if b == own or landmark >= m:
                direct += tokens
            elif not causal or landmark <= i:
                groups.append((landmark, tokens))
        if top_k is not None:
            groups = sorted(groups, key=lambda group: s[i, group[0]].item(), reverse=True)[:top_k]
        members = direct + [landmark for landmark, _ in groups]
        first = dict(zip(members, s[i, members].softmax(0), strict=True))
        for j in direct:
            row[j] = first[j]
        for landmark, tokens in groups:
            for j, p in zip(tokens, s[i, tokens].softmax(0), strict=True):
                row[j] = first[landmark] * p
        rows.append(torch.stack(row))
    return torch.stack(rows)


def all_by_hand(q, k, block, causal, cross=False, top_k=None):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.stack([by_hand(s, block, causal, cross, top_k) for s in scores.flatten(0, 1)]).view(scores.shape)


@pytest.mark.parametrize("top_k", [None, 1, 2, 30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "block", "kv_heads"), [(30, 4, 2), (33, 4, 1), (9, 1, 2), (5, 8, 2)])
def test_grouped_softmax_of_the_paper(n, block, kv_heads, causal, top_k):
    q, k, v = qkv(n, kv_heads=kv_heads)
    weights = all_by_hand(q, k, block, causal, top_k=top_k)
    core = LandmarkAttention(2, 8, block, top_k)
    torch.testing.assert_close(core.weights(q, k, causal=causal), weights)
    expected = weights @ v.repeat_interleave(2 // kv_heads, 1)
    y = core(q, k, v, causal=causal)
    torch.testing.assert_close(y, expected)
    goal = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (q, k, v), goal), torch.autograd.grad(expected, (q, k, v), goal), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("m", [30, 33, 3])
def test_cross_attention_has_no_own_block(m, top_k):
    q, k, v = qkv(7, m)
    core = LandmarkAttention(2, 8, 4, top_k)
    expected = all_by_hand(q, k, 4, False, cross=True, top_k=top_k) @ v
    torch.testing.assert_close(core(q, k, v, cross=True), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_and_landmarks_are_not_read(causal):
    q, k, _ = qkv(33)
    weights = LandmarkAttention(2, 8, 4).weights(q, k, causal=causal)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 33, dtype=torch.float64))
    assert not weights[..., 4::5].any()


def test_retrieving_all_blocks_is_the_grouped_softmax():
    q, k, v = qkv(40)
    full = LandmarkAttention(2, 8, 4)(q, k, v, causal=True)
    core = LandmarkAttention(2, 8, 4, top_k=7)  # of eight blocks, seven are earlier than the last
    torch.testing.assert_close(core(q, k, v, causal=True), full)


def test_softmax_where_landmarks_score_the_log_sum_exp_of_their_block():
    """All queries are alike, so that the first channel of a key is its score."""
    n, block, dim = 23, 4, 24
    q = torch.zeros(1, 1, n, dim, dtype=torch.float64)
    q[..., 0] = dim**0.5
    k = torch.zeros(1, 1, n, dim, dtype=torch.float64)
    k[..., 0] = torch.randn(n, dtype=torch.float64)
    landmark = torch.arange(n) % 5 == 4
    for at in landmark.nonzero().flatten().tolist():
        k[0, 0, at, 0] = k[0, 0, at - 4 : at, 0].logsumexp(0)
    weights = LandmarkAttention(1, dim, block).weights(q, k, causal=True)[0, 0]
    expected = k[0, 0, :, 0].expand(n, n).masked_fill(landmark | ~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    rows = ~landmark  # a landmark's own block is read too, so its row holds as well
    torch.testing.assert_close(weights[rows], expected.softmax(-1)[rows])
    torch.testing.assert_close(weights[landmark], expected.softmax(-1)[landmark])


def test_retrieval_reads_few_blocks():
    q, k, _ = qkv(200)
    read = LandmarkAttention(2, 8, 4, top_k=3).weights(q, k, causal=True).unflatten(-1, (40, 5)).sum(-1) > 0
    own = torch.arange(200) // 5
    assert torch.equal(read.sum(-1), (own.clamp(max=3) + 1).expand(2, 2, 200))


@pytest.mark.parametrize("top_k", [None, 2])
def test_masked_keys_are_in_no_group(top_k):
    q, k, v = (t.detach() for t in qkv(33))
    keep = torch.rand(2, 33) < 0.7
    keep[0, 5:9] = False  # a whole block, its landmark left
    keep[1, 14] = False  # a landmark, its block left
    core = LandmarkAttention(2, 8, 4, top_k)
    noisy = torch.where(keep[:, None, :, None], k, 50 * torch.randn_like(k))
    for causal in (False, True):
        mask = masks.keys(keep)
        weights = core.weights(q, k, mask=mask, causal=causal)
        torch.testing.assert_close(core(q, noisy, v, mask=mask, causal=causal), weights @ v)
        assert not weights[0, ..., 5:10].any()
        assert not weights[1, :, 15:, 10:15].any()
        total = weights.sum(-1)
        assert ((total - 1).abs().lt(1e-9) | (total == 0)).all()


@pytest.mark.parametrize("top_k", [None, 1])
def test_decoding_over_landmarks(top_k):
    attn = crosslight.create("landmark-attention", dim=16, heads=2, block=3, top_k=top_k, position="rope").double()
    x = torch.randn(2, 27, 16, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    with torch.no_grad():
        for i in range(27):
            y, cache = attn.step(x[:, i : i + 1], cache)
            torch.testing.assert_close(y[:, 0], expected[:, i])
        start, cache = attn.step(x[:, :11])
        rest, _ = attn.step(x[:, 11:], cache)
    torch.testing.assert_close(torch.cat([start, rest], 1), expected)


@pytest.mark.parametrize("n", [1, 4, 8, 11])
def test_landmarks_are_put_in_and_taken_out(n):
    x, landmark = torch.randn(2, n, 6), torch.randn(6)
    y = insert(x, landmark, 4)
    marks = torch.arange(y.shape[1]) % 5 == 4
    assert int(marks.sum()) == n // 4
    assert (y[:, marks] == landmark).all()
    assert torch.equal(y[:, ~marks], x)
    assert torch.equal(remove(y, 4), x)


def test_the_same_in_chunks_of_queries(monkeypatch):
    q, k, v = qkv(40)
    for top_k in (None, 2):
        core = LandmarkAttention(2, 8, 4, top_k)
        whole = core(q, k, v, causal=True)
        with monkeypatch.context() as patch:
            patch.setattr("crosslight.engines.dense.CHUNK", 2000)
            torch.testing.assert_close(core(q, k, v, causal=True), whole)


def test_one_block_is_softmax():
    q, k, v = qkv(20)
    y = LandmarkAttention(2, 8, 20)(q, k, v, causal=True)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_paper_defaults_and_bad_options():
    core = crosslight.create("landmark-attention", dim=32, heads=4).core
    assert (core.block, core.top_k) == (50, None)
    for wrong in ({"block": 0}, {"top_k": 0}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("landmark-attention", dim=32, heads=4, **wrong)
