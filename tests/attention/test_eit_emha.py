"""Enhanced multi-head attention: the maps written out, the multi-head limit, which head meets which."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crosslight
from crosslight.engines import dense
from crosslight.errors import CrosslightError

HEADS, D, N, M = 3, 4, 7, 6
DIM = HEADS * D


def make(**options):
    return crosslight.create("eit-emha", **{"dim": DIM, "heads": HEADS, **options}).double()


@pytest.fixture
def heads():
    return torch.randn(2, HEADS, N, D).double(), torch.randn(2, HEADS, M, D).double()


def select_same(core):
    """Make the inner-subspace interaction select S_ii: relu(s) - relu(-s) = s."""
    for p in core.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        for i in range(HEADS):
            core.mix[i, 0, i], core.mix[i, 1, i] = 1.0, -1.0
            core.rest[1].weight[i, :2, 0, 0] = torch.tensor([1.0, -1.0])
            for h, sign in ((2 * i, 1.0), (2 * i + 1, -1.0)):
                core.rest[2].weight[h, i] = sign
                core.rest[4].weight[i, h] = sign


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("efficient", [False, True])
def test_weights_are_the_maps_written_out(causal, efficient, heads):
    core, (q, k) = make(efficient=efficient).core, heads
    if causal:
        k = torch.randn_like(q)
    maps = [q[:, i] @ k[:, j].mT / D**0.5 for i in range(HEADS) for j in range(HEADS)]
    s = torch.stack(maps, 1)
    first = F.conv2d(s, core.mix.flatten(0, 1)[..., None, None], core.shift, groups=HEADS).relu()
    if efficient:
        s = F.conv2d(first, core.rest[1].weight)
    else:
        s = F.conv2d(first, core.rest[1].weight, core.rest[1].bias, groups=HEADS)
        s = F.conv2d(F.conv2d(s, core.rest[2].weight, core.rest[2].bias).relu(), core.rest[4].weight)
    if causal:
        s = s.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(core.weights(q, k, causal=causal), s.softmax(-1))


def test_selecting_the_same_head_is_multi_head_attention():
    attn, x = make(), torch.randn(2, N, DIM, dtype=torch.double)
    select_same(attn.core)
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        plain.out_proj.load_state_dict(attn.out.state_dict())
    assert torch.allclose(attn(x), plain(x, x, x)[0], atol=1e-12)


def test_inner_interaction_reads_all_key_heads_and_cross_interaction_all_query_heads(heads):
    core, (q, k) = make().core, heads
    select_same(core)
    with torch.no_grad():
        core.mix[0, 0, 1] = 0.5  # query head 0 now also meets key head 1

    def changed(which, head):
        other = [q.clone(), k.clone()]
        other[which][:, head] += 1 + torch.rand_like(other[which][:, head])
        gap = core.weights(*other) - core.weights(q, k)
        return [i for i in range(HEADS) if gap[:, i].abs().max() > 1e-9]

    assert changed(1, 1) == [0, 1]
    assert changed(0, 2) == [2]
    with torch.no_grad():
        core.rest[2].weight[0, 2] = 0.5  # head 0's map now hears of head 2's
    assert changed(0, 2) == [0, 2]


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_of_queries_give_the_same(causal, monkeypatch):
    attn, x = make(), torch.randn(2, N, DIM, dtype=torch.double, requires_grad=True)
    results = []
    for chunk in (1 << 24, 1000):
        monkeypatch.setattr(dense, "CHUNK", chunk)
        y = attn(x, causal=causal)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(*results)
    rows = attn.weights(x, causal=causal)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, HEADS, N, dtype=torch.double))


def test_it_costs_few_parameters():
    attn, plain = make(), crosslight.create("softmax", dim=DIM, heads=HEADS)
    extra = sum(p.numel() for p in attn.parameters()) - sum(p.numel() for p in plain.parameters())
    inner, cross = 8 * HEADS, 4 * HEADS
    assert extra == (inner * HEADS + inner) + (inner + HEADS) + (cross * HEADS + cross) + HEADS * cross


@pytest.mark.parametrize("name", ["inner", "cross"])
def test_bad_options_are_named(name):
    with pytest.raises(CrosslightError, match=f"{name}: got 0"):
        make(**{name: 0})
