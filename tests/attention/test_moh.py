"""Mixture of heads: gates, the plain limit, the balance loss."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError

DIM, HEADS = 32, 8


def make(**options):
    return crosslight.create("moh", **{"dim": DIM, "heads": HEADS, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, 9, DIM, dtype=torch.double)


def uniform(attn):
    for router in (attn.to_routed, attn.to_shared, attn.to_balance):
        nn.init.zeros_(router.weight)
    return attn


def test_all_heads_active_and_uniform_routers_are_multi_head_attention(x):
    attn = uniform(make(shared=3, active=5))
    plain = crosslight.create("softmax", dim=DIM, heads=HEADS).double()
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if not k.startswith("to_")})
    for causal in (False, True):
        assert torch.allclose(attn(x, causal=causal), plain(x, causal=causal), atol=1e-12)


def test_each_token_uses_shared_and_active_heads(x):
    attn = make(shared=2, active=3)
    gates = attn.gates(x)
    assert ((gates != 0).sum(-1) == 5).all()
    balance = 2 * attn.to_balance(x).softmax(-1)
    assert torch.allclose(gates.sum(-1), balance @ torch.tensor([2.0, 3.0], dtype=torch.double), atol=1e-12)


def test_output_is_the_gated_sum_of_heads(x):
    attn = make(shared=2, active=3)
    heads = attn.weights(x) @ attn._values(x)
    y = attn.out.bias + sum(
        attn.gates(x)[..., i : i + 1] * heads[:, i] @ attn.out.weight[:, i * 4 : i * 4 + 4].T for i in range(HEADS)
    )
    assert torch.allclose(attn(x), y, atol=1e-12)


def test_a_head_that_is_left_out_has_no_influence(x):
    attn = make(shared=2, active=3)
    off = (attn.gates(x) == 0).nonzero()[0].tolist()
    batch, token, head = off
    before = attn(x)[batch, token]
    with torch.no_grad():
        attn.out.weight[:, head * 4 : head * 4 + 4] += 1
    assert torch.equal(attn(x)[batch, token], before)


def test_balance_loss_is_k_when_even_and_grows_when_collapsed():
    attn = make(shared=2, active=2)
    nn.init.zeros_(attn.to_routed.weight)
    p_even = attn.balance_loss(torch.randn(4, 50, DIM, dtype=torch.double))
    assert torch.allclose(p_even, torch.tensor(2.0).double(), atol=1e-9)
    collapsed = make(shared=2, active=2)
    with torch.no_grad():
        collapsed.to_routed.weight[0] = 10.0
    assert collapsed.balance_loss(torch.ones(1, 8, DIM).double()) > 5


def test_bad_counts_are_named():
    with pytest.raises(CrosslightError, match="shared: got 8"):
        make(shared=8)
    with pytest.raises(CrosslightError, match="active: got 7"):
        make(shared=2, active=7)
