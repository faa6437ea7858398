"""Mixture of sparse attention: the paper's equations head by head, and the choice as tokens come."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.engines.positions import Rotary
from crosslight.errors import CrosslightError


def layer(**options):
    options = {"dim": 24, "heads": 3, "head_dim": 8, "sparsity": 4, "dense_heads": 0, **options}
    attn = crosslight.create("mosa", **options).double()
    with torch.no_grad():
        attn.router.weight.mul_(5)
    return attn


def tokens(n, batch=2, dim=24):
    return torch.randn(batch, n, dim, dtype=torch.float64, requires_grad=True)


def rotated(t, position):
    """The pairs (c, c + 2) of the first four of eight channels, turned one by one."""
    out = t.clone()
    for c in range(2):
        angle = torch.tensor(position * 10_000.0 ** (-2 * c / 4), dtype=torch.float64)
        out[c] = t[c] * angle.cos() - t[c + 2] * angle.sin()
        out[c + 2] = t[c + 2] * angle.cos() + t[c] * angle.sin()
    return out


def by_hand(attn, x, causal, chosen):
    """Token by token; ``chosen(b, h)`` are the tokens of a head."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(attn.sparse_heads):
            r = torch.sigmoid(x[b] @ attn.router.weight[h])
            index = chosen(b, h)
            w_q, w_k, w_v = attn.qkv[h].split(8, 1)
            for i in index:
                read = [j for j in index if j <= i] if causal else index
                q = rotated(x[b, i] @ w_q, i)
                scores = torch.stack([q @ rotated(x[b, j] @ w_k, j) for j in read]) / 8**0.5
                value = sum(a * (x[b, j] @ w_v) for a, j in zip(scores.softmax(0), read, strict=True))
                y[b, i] = y[b, i] + r[i] * value @ attn.out[h]
    return y


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_first", [False, True])
def test_expert_choice_as_in_the_paper(causal, include_first):
    """As PureMoSA of the authors: top k of the whole sequence, k = n // sparsity."""
    attn, x = layer(lookahead=True, include_first=include_first), tokens(26)
    scores = x @ attn.router.weight.T

    def chosen(b, h):
        s = scores[b, :, h]
        if not include_first:
            return sorted(s.topk(6).indices.tolist())
        return [0, *sorted((s[1:].topk(5).indices + 1).tolist())]

    expected = by_hand(attn, x, causal, chosen)
    y = attn(x, causal=causal)
    torch.testing.assert_close(y, expected)
    goal, of = torch.randn_like(y), [x, *attn.parameters()]
    for a, b in zip(torch.autograd.grad(y, of, goal), torch.autograd.grad(expected, of, goal), strict=True):
        torch.testing.assert_close(a, b)


def taken_one_by_one(scores, quota):
    taken = []
    for t, s in enumerate(scores):
        if s > 0.5 and len(taken) < quota(t + 1):
            taken.append(t)
    return taken


@pytest.mark.parametrize("options", [{"sparsity": 4}, {"sparsity": 1}, {"sparsity": 50}, {"tokens": 5}])
def test_the_causal_choice_takes_tokens_as_they_come(options):
    attn, x = layer(**options), tokens(40)
    r = attn.scores(x)
    expected = by_hand(attn, x, True, lambda b, h: taken_one_by_one(r[b, h].tolist(), attn.quota))
    torch.testing.assert_close(attn(x, causal=True), expected)


def test_all_tokens_and_scores_of_one_are_dense_causal_attention():
    attn, x = layer(sparsity=1, rotate=1.0, lookahead=True), tokens(17)
    attn.scores = lambda x: torch.ones(2, 3, 17, dtype=torch.float64)
    q, k, v = (x[:, None] @ attn.qkv).chunk(3, -1)
    rope = Rotary(8)
    y = F.scaled_dot_product_attention(rope.rotate(q), rope.rotate(k), v, is_causal=True)
    expected = torch.einsum("bhnd,hde->bne", y, attn.out)
    torch.testing.assert_close(attn(x, causal=True), expected)
    attn.lookahead = False
    torch.testing.assert_close(attn(x, causal=True), expected)


def test_tokens_that_were_not_chosen_get_nothing(monkeypatch):
    attn, x = layer(), tokens(26)
    shapes = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **o: shapes.append((a[0].shape, a[1].shape)) or attend(*a, **o)
    )
    y = attn(x)
    assert shapes == [((2, 3, 6, 8), (2, 3, 6, 8))]
    weights = attn.weights(x)
    assert ((weights.sum(-1) > 0).sum(-1) == 6).all()
    assert ((weights.sum(-2) > 0).sum(-1) == 6).all()
    left_out = (weights.sum(-1) == 0).all(1)
    assert left_out.any()
    assert not y[left_out].any()


def test_dense_heads_beside():
    attn, x = layer(heads=5, dense_heads=2), tokens(26)
    assert attn.weights(x, causal=True).shape == (2, 5, 26, 26)
    alone = layer(heads=3)
    alone.load_state_dict({name: t for name, t in attn.state_dict().items() if not name.startswith("dense")})
    torch.testing.assert_close(attn(x, causal=True), alone(x, causal=True) + attn.dense(x, causal=True))


@pytest.mark.parametrize("options", [{"dense_heads": 1}, {"include_first": True}, {"tokens": 4}])
def test_decoding_keeps_the_taken_tokens(options):
    attn, x = layer(**options), tokens(40)
    expected, cache = attn(x, causal=True), None
    with torch.no_grad():
        for i in range(40):
            y, cache = attn.step(x[:, i : i + 1], cache)
            torch.testing.assert_close(y[:, 0], expected[:, i])
            assert cache.keys.shape[2] == attn.quota(i + 1)
            assert (cache.count <= attn.quota(i + 1)).all()


def test_the_future_changes_no_choice():
    attn, x = layer(), tokens(40)
    before = attn(x, causal=True)
    for cut in (3, 17, 30):
        changed = torch.cat([x[:, :cut], 10 * torch.randn_like(x[:, cut:])], 1)
        torch.testing.assert_close(attn(changed, causal=True)[:, :cut], before[:, :cut])


def test_masked_tokens_are_not_chosen():
    attn, x = layer(sparsity=1), tokens(20)
    keep = torch.rand(2, 20) < 0.5
    for causal in (False, True):
        weights = attn.weights(x, mask=keep, causal=causal)
        assert not weights.transpose(-1, -2)[~keep[:, None].expand(2, 3, 20)].any()
        assert not weights[~keep[:, None].expand(2, 3, 20)].any()


def test_paper_defaults_and_bad_options():
    attn = crosslight.create("mosa", dim=64)
    assert (attn.heads, attn.sparse_heads, attn.position.width, attn.position.inner.base) == (8, 4, 4, 10_000)
    assert [attn.quota(t) for t in (1, 2, 20, 64)] == [1, 2, 2, 4]
    for wrong in ({"sparsity": 0}, {"dense_heads": 8}, {"tokens": 0}, {"rotate": 2.0}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("mosa", dim=64, **wrong)
