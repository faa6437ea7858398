"""Mixture of attention heads: the multi-query limit, experts written out, routing, losses, cost."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.moa_heads import Tiles
from crosslight.errors import CrosslightError
from crosslight.testing import flops

DIM, HEADS, N = 32, 4, 9


def make(**options):
    return crosslight.create("moa-heads", **{"dim": DIM, "heads": HEADS, "experts": 6} | options).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


@pytest.mark.parametrize("causal", [False, True])
def test_all_experts_with_equal_gates_are_multi_query_attention(causal, x):
    attn = make(experts=HEADS)
    nn.init.zeros_(attn.router.weight)
    plain = crosslight.create("mqa", dim=DIM, heads=HEADS, bias=False).double()
    with torch.no_grad():
        plain.q.weight.copy_(attn.q.weight.permute(0, 2, 1).flatten(0, 1))
        plain.out.weight.copy_(attn.out.weight.flatten(0, 1).T)
        plain.k.weight.copy_(attn.k.weight)
        plain.v.weight.copy_(attn.v.weight)
    # The gates are 1 / heads each, where the sum over heads has 1.
    torch.testing.assert_close(HEADS * attn(x, causal=causal), plain(x, causal=causal))


@pytest.mark.parametrize("renormalise", ["detached", "full", "none"])
def test_tokens_are_their_experts_written_out(renormalise, x):
    attn = make(renormalise=renormalise)
    k, v, p = attn.k(x), attn.v(x), attn.router(x).softmax(-1)
    y = torch.zeros_like(x)
    for b in range(2):
        for t in range(N):
            chosen = sorted(range(6), key=lambda i: -p[b, t, i].item())[:HEADS]
            total = 1 if renormalise == "none" else sum(p[b, t, i] for i in chosen)
            for i in chosen:
                row = (x[b, t] @ attn.q.weight[i] @ k[b].T / attn.head_dim**0.5).softmax(-1)
                y[b, t] += p[b, t, i] / total * (row @ v[b] @ attn.out.weight[i])
    torch.testing.assert_close(attn(x), y)


def test_an_expert_that_is_not_chosen_has_no_influence(x):
    attn = make()
    chosen, y = attn.route(x).expert, attn(x)
    with torch.no_grad():
        attn.q.weight[2] += 1
        attn.out.weight[2] += 1
    without = (chosen != 2).all(-1)
    assert without.any()
    changed = attn(x)
    torch.testing.assert_close(changed[without], y[without])
    assert (changed[~without] != y[~without]).any(-1).all()


@pytest.mark.parametrize(("pairs", "experts"), [(40, 6), (3, 8), (1, 1), (64, 2), (17, 17), (100, 3)])
def test_tiles_hold_every_pair_once_with_its_expert(pairs, experts):
    for expert in (torch.randint(experts, (pairs,)), torch.zeros(pairs, dtype=torch.long)):
        tiles = Tiles.of(expert, experts)
        assert tiles.row.unique().numel() == pairs
        assert torch.equal(tiles.expert[tiles.row // tiles.size], expert)
        assert len(tiles.expert) * tiles.size <= max(pairs, 1.5 * pairs + experts)


def test_what_a_token_costs_does_not_depend_on_the_number_of_experts():
    x, work = torch.randn(1, 512, DIM), []
    for experts in (4, 16, 64):
        attn = make(experts=experts).float()
        route = attn.route(x)
        with torch.no_grad():
            work.append(flops.measure(lambda a=attn, r=route: a._merge(a._queries(x, r), x, r)).flops)
    assert work[0] == work[1] == work[2]


def test_the_sum_of_the_gates_is_a_constant_for_the_router(x):
    attn, full = make(), make(renormalise="full")
    full.load_state_dict(attn.state_dict())
    torch.testing.assert_close(attn(x), full(x))
    gate = attn.route(x).gate
    torch.testing.assert_close(gate.sum(-1), torch.ones(2, N, dtype=torch.double))
    assert torch.autograd.grad(gate.sum(), attn.router.weight)[0].abs().max() > 1e-3
    assert torch.autograd.grad(full.route(x).gate.sum(), full.router.weight)[0].abs().max() < 1e-12


def test_losses_are_those_of_the_paper(x):
    attn = make()
    logits = attn.router(x).flatten(0, 1)
    p, used = logits.softmax(-1), torch.zeros(6, dtype=torch.double)
    for row in p:
        for i in row.topk(HEADS).indices:
            used[i] += 1
    torch.testing.assert_close(attn.balance_loss(x), 6 * (used / used.sum() * p.mean(0)).sum())
    torch.testing.assert_close(attn.router_z_loss(x), logits.exp().sum(-1).log().square().mean())
    even = make(heads=1, head_dim=8, experts=2)
    with torch.no_grad():
        even.router.weight.copy_(torch.eye(2, DIM))
    one = torch.zeros(1, 2, DIM, dtype=torch.double)
    one[0, 0, 0] = one[0, 1, 1] = 1.0
    torch.testing.assert_close(even.balance_loss(one), torch.ones((), dtype=torch.double))


def test_noise_is_drawn_in_training_only(x):
    attn = make(noisy=True)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))
    attn.train()(x).sum().backward()
    assert attn.noise.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3}, "experts: got 3, expected at least heads = 4"),
        ({"position": "alibi"}, "position: got 'alibi'"),
        ({"renormalise": "sum"}, "renormalise: got 'sum'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(CrosslightError, match=message):
        make(**options)
