"""Tree cross attention: the walk written out, and the invariants of its row."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.errors import CrosslightError

DIM = 16


def made(**options):
    attn = crosslight.create("tree-cross-attention", dim=DIM, heads=2, **options).double().eval()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return attn


def streams(n=5, m=23):
    return torch.randn(2, n, DIM, dtype=torch.float64), torch.randn(2, m, DIM, dtype=torch.float64)


def by_hand(attn, x, z, keep):
    """One example: outputs, and for each query the leaves below each node of S."""
    m, b = len(z), attn.branch
    k = math.floor(math.log(m - 1) / math.log(b) + 1e-9) if m > 1 else 0
    below = math.ceil(m / b**k)

    def node(depth, number):
        """Embedding and tokens of a node, and its children."""
        if depth == k + 1:
            return (z[number], [number], []) if number < m and keep[number] else None
        width = below if depth == k else b
        found = [node(depth + 1, number * width + c) for c in range(width)]
        children = [c for c in found if c is not None]
        if not children:
            return None
        inner = torch.stack([c[0] for c in children])[None]
        for i in range(len(attn.aggregate.mlp)):
            inner = inner + attn.aggregate.attend[i](attn.aggregate.norms[2 * i](inner))
            inner = inner + attn.aggregate.mlp[i](attn.aggregate.norms[2 * i + 1](inner))
        return inner[0].mean(0), [leaf for c in children for leaf in c[1]], children

    def split(t):
        return t.unflatten(-1, (attn.heads, -1))

    outputs, covers = [], []
    for token in x:
        q, here, chosen = split(attn.q(token)), node(0, 0), []
        for _ in range(k):
            keys = torch.stack([split(attn.k(c[0])) for c in here[2]])
            p = ((keys * q).sum(-1) * attn.scale).softmax(0).mean(1)
            best = int(p.argmax())
            chosen += [c for i, c in enumerate(here[2]) if i != best]
            here = here[2][best]
        chosen += here[2]
        nodes = torch.stack([c[0] for c in chosen])
        a = ((split(attn.k(nodes)) * q).sum(-1) * attn.scale).softmax(0)
        outputs.append(attn.out((a.unsqueeze(-1) * split(attn.v(nodes))).sum(0).flatten()))
        covers.append([c[1] for c in chosen])
    return torch.stack(outputs), covers


@pytest.mark.parametrize(("branch", "m"), [(2, 23), (2, 16), (3, 23), (4, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_walk_written_out(branch, m, masked):
    attn, (x, z) = made(branch=branch, layers=2), streams(m=m)
    keep = torch.rand(2, m) < 0.6 if masked else torch.ones(2, m, dtype=torch.bool)
    keep[:, 0] = True
    mask = keep if masked else None
    y, weights = attn(x, z, mask=mask), attn.weights(x, z, mask=mask)
    torch.testing.assert_close(attn(x, z, mask=mask, causal=True), y)
    for b in range(2):
        expected, covers = by_hand(attn, x[b], z[b], keep[b])
        torch.testing.assert_close(y[b], expected)
        for i, cover in enumerate(covers):
            # Each token that may be read is below exactly one node, and shares its weight evenly with the others.
            assert sorted(leaf for leaves in cover for leaf in leaves) == keep[b].nonzero().flatten().tolist()
            for leaves in cover:
                assert (weights[b, :, i, leaves] - weights[b, :, i, leaves[:1]]).abs().max() < 1e-12
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize(("branch", "m", "size"), [(2, 256, 9), (2, 257, 10), (4, 256, 13), (16, 256, 31), (2, 2, 2)])
def test_number_of_nodes_that_are_read(branch, m, size):
    """(b - 1) k + P, which grows as log m."""
    attn, (x, z) = made(branch=branch), streams(m=m)
    levels = attn._grow(z, None)
    walks = list(attn._walk(attn._split(attn.q(x)), levels, False))
    k = len(walks) - 1
    assert size == (branch - 1) * k + math.ceil(m / branch**k)
    read = sum(walk.read.sum(-1) for walk in walks)
    assert (read <= size).all()
    if m % branch**k == 0:
        assert (read == size).all()


def test_a_branch_factor_of_all_tokens_is_plain_cross_attention():
    attn, (x, z) = made(branch=23), streams()
    q, k, v = attn._split(attn.q(x)), attn._split(attn.k(z)), attn._split(attn.v(z))
    plain = attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, z), plain)
    torch.testing.assert_close(attn.retrieve(x, z).leaves, plain)
    torch.testing.assert_close(made(branch=2).retrieve(x, z).entropy > 0, torch.ones(2, 5, dtype=torch.bool))


def test_the_way_is_drawn_with_the_probability_it_reports():
    attn, (x, z) = made(), streams(n=1, m=8)
    with torch.no_grad():
        attn.q.weight.mul_(0.3)  # no way is too rare to be seen
    x, z = x[:1].expand(4000, -1, -1), z[:1].expand(4000, -1, -1)
    with torch.no_grad():
        drawn = attn.retrieve(x, z)
    ways, count = drawn.log_prob.flatten().unique(return_counts=True)
    assert len(ways) == 4
    torch.testing.assert_close(count / 4000, ways.exp().float(), atol=0.04, rtol=0.1)
    best = attn.retrieve(x[:1], z[:1], draw=False)
    torch.testing.assert_close(best.y, attn(x[:1], z[:1]))
    attn.train()
    assert len(attn(x, z).detach().flatten(1).unique(dim=0)) == 4


def test_the_policy_loss_reaches_the_walk_and_bptt_the_leaves():
    attn, (x, z) = made(), streams()
    loss = attn.retrieve(x, z).policy_loss(torch.rand(2, 5, dtype=torch.float64))
    found = torch.autograd.grad(loss, (attn.q.weight, attn.k.weight))
    assert all(g.abs().max() > 0 for g in found)
    assert torch.autograd.grad(attn.retrieve(x, z).log_prob.sum(), attn.v.weight, allow_unused=True)[0] is None
    for bptt in (False, True):
        attn.bptt = bptt
        leaf = z.clone().requires_grad_()
        summary = attn._grow(leaf, None)[0].k.sum()
        (g,) = torch.autograd.grad(summary, leaf, allow_unused=True)
        assert (g is not None) == bptt


def test_decoding_keeps_the_tree():
    attn, (x, z) = made(), streams()
    cache = None
    for i in range(5):
        y, cache = attn.step(x[:, i : i + 1], cache, context=z if i == 0 else None)
        torch.testing.assert_close(y[:, 0], attn(x, z, causal=True)[:, i])
    assert [level.k.shape[2] for level in cache.levels] == [2, 4, 8, 16, 32]


def test_bad_options_are_refused():
    for wrong in ({"branch": 1}, {"layers": 0}, {"context_dim": 13}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            made(**wrong)


def test_many_queries_and_parents_are_taken_in_parts(monkeypatch):
    torch.manual_seed(0)
    attn, (x, z) = made(bptt=True), streams(n=7, m=23)

    def taken():
        inputs = [x.clone().requires_grad_(), z.clone().requires_grad_()]
        y = attn(*inputs)
        return y, *torch.autograd.grad(y.square().sum(), [*inputs, *attn.parameters()])

    whole = taken()
    module = importlib.import_module(type(attn).__module__)
    monkeypatch.setattr(module, "QUERIES", 3)
    monkeypatch.setattr(module, "PARENTS", 2)
    for ours, theirs in zip(taken(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
