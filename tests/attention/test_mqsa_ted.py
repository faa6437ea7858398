"""Queries of two lengths: the moving average, the block written out, the mix, and the loss of TED."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.mqsa_ted import moving_average, transition_loss, transitions
from crosslight.errors import CrosslightError

DIM, HEADS, N = 16, 2, 9


def make(**options):
    return crosslight.create("mqsa-ted", **{"dim": DIM, "heads": HEADS, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


def block(branch, x, keep):
    """One branch token by token, causal."""
    c = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(N):
            kept = [x[b, s] for s in range(max(0, t - branch.length + 1), t + 1) if keep[b, s]]
            c[b, t] = torch.stack(kept).mean(0) if kept else 0
    c = branch.norm_query(c)
    q, k, v = branch.q(c), branch.k(x), branch.v(x)
    read, d = torch.zeros_like(x), DIM // HEADS
    for b in range(len(x)):
        for t in range(N):
            seen = [s for s in range(t + 1) if keep[b, s]]
            for h in range(HEADS if seen else 0):
                at = slice(h * d, (h + 1) * d)
                row = (k[b, seen][:, at] @ q[b, t, at] / math.sqrt(d)).softmax(-1)
                read[b, t, at] = row @ v[b, seen][:, at]
    h = branch.norm(read + c)
    return branch.norm_last(h + F.linear(F.linear(h, *branch.mlp[0].parameters()).relu(), *branch.mlp[2].parameters()))


@pytest.mark.parametrize(("length", "alpha"), [(3, 0.5), (4, 0.2), (20, 0.5), (1, 0.3)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_paper_written_out(length, alpha, padded, x):
    attn = make(length=length, alpha=alpha)
    keep = torch.ones(2, N, dtype=torch.bool)
    if padded:
        keep[1, :4] = False  # sessions are padded on the left
    parts = [block(branch, x, keep) for branch in attn.branches]
    expected = alpha * parts[0] + (1 - alpha) * parts[1] if length > 1 else parts[0]
    torch.testing.assert_close(attn(x, mask=keep if padded else None, causal=True), expected)


def test_one_branch_is_a_block_with_plain_attention(x):
    """With L = 1 and alpha = 1 it is the block of SASRec: plain attention asked by LN(x), reading x."""
    attn = make(alpha=1.0, last=False)
    assert len(attn.branches) == 1
    branch, plain = attn.branches[0], torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([branch.q.weight, branch.k.weight, branch.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([branch.q.bias, branch.k.bias, branch.v.bias]))
        plain.out_proj.weight.copy_(torch.eye(DIM))
        plain.out_proj.bias.zero_()
    c = branch.norm_query(x)
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    h = branch.norm(plain(c, x, x, attn_mask=future)[0] + c)
    torch.testing.assert_close(attn(x, causal=True), h + branch.mlp(h))


def test_alpha_mixes_the_outputs_and_so_the_scores(x):
    attn, items = make(alpha=0.3), torch.randn(5, DIM, dtype=torch.double)
    ends = []
    for alpha, i in ((1.0, 0), (0.0, 1)):
        one = make(alpha=alpha)
        one.branches[0].load_state_dict(attn.branches[i].state_dict())
        ends.append(one(x, causal=True) @ items.T)
    torch.testing.assert_close(attn(x, causal=True) @ items.T, 0.3 * ends[0] + 0.7 * ends[1])


@pytest.mark.parametrize("length", [1, 3, 12])
def test_moving_average_is_causal_and_leaves_padding_out(length, x):
    x.requires_grad_()
    keep = torch.rand(2, N) < 0.6
    y = moving_average(x, length, keep)
    for t in range(N):
        window = slice(max(0, t - length + 1), t + 1)
        kept = keep[:, window].unsqueeze(-1).double()
        torch.testing.assert_close(y[:, t], (x[:, window] * kept).sum(1) / kept.sum(1).clamp(min=1))
        (slope,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert not slope[:, t + 1 :].any()
        assert not slope[~keep].any()


def test_weights_show_both_branches(x):
    weights = make().weights(x, causal=True)
    assert weights.shape == (2, 2 * HEADS, N, N)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2 * HEADS, N, dtype=torch.double))


def test_the_cache_keeps_no_more_tokens_than_the_means_need(x):
    attn, cache = make(length=4), None
    for t in range(N):
        _, cache = attn.step(x[:, t : t + 1], cache)
        assert cache.recent.shape[1] == min(t + 1, 3)


def test_transitions_are_counted():
    sequences = torch.tensor([[0, 1, 2, 1], [3, 0, 1, 1]])
    counts = transitions(sequences, 4)
    expected = torch.zeros(4, 4)
    for i, j in ((0, 1), (1, 2), (2, 1), (3, 0), (0, 1), (1, 1)):
        expected[i, j] += 1
    assert torch.equal(counts, expected)
    keep = torch.tensor([[False, True, True, True], [False, False, True, True]])
    assert transitions(sequences, 4, keep).sum() == 3


def test_transition_loss_is_least_where_scores_are_the_counts():
    tau, dim = 0.1, 4
    e = torch.eye(4, dtype=torch.double, requires_grad=True)
    counts = 3.0 * torch.eye(4, dtype=torch.double)
    # sqrt(dim) e_i E^T has to be row_i / max(row_i): 1 on the diagonal.
    best = (e / dim**0.25).detach().requires_grad_()
    loss = transition_loss(best, counts, tau)
    target = (counts / 3 / tau).softmax(-1)
    torch.testing.assert_close(loss, -(target * target.log()).sum(-1).mean())
    assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-12
    assert transition_loss(e, counts, tau) > loss
    some = torch.tensor([2, 0])
    torch.testing.assert_close(transition_loss(e, counts[some], tau, some), transition_loss(e, counts, tau))
    # An item without successors asks for nothing in particular.
    assert transition_loss(e, torch.zeros_like(counts), tau).isfinite()


@pytest.mark.parametrize(("name", "value"), [("length", 0), ("alpha", 1.5), ("heads", 3)])
def test_bad_options_are_named(name, value):
    with pytest.raises(CrosslightError, match=f"{name}: got {value}"):
        make(**{name: value})
