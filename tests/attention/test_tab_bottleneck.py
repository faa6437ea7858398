"""The bottleneck: what the gate lets through, that nothing passes beside it, what edits do."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.tab_bottleneck import localisation_loss

DIM = 16


def make(**options):
    return crosslight.create("tab-bottleneck", **{"dim": DIM, **options}).double()


@pytest.fixture
def pair():
    """The tokens of two images, [CLS ; patches]."""
    return torch.randn(2, 10, DIM, dtype=torch.double), torch.randn(2, 10, DIM, dtype=torch.double)


def test_there_is_one_head(pair):
    before, after = pair
    assert make().weights(before[:, :1], after).shape == (2, 1, 1, 10)


@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_multi_head_attention_gated_afterwards(heads, pair):
    before, after = pair
    attn = make(heads=heads)
    plain = nn.MultiheadAttention(DIM, heads, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
    a = plain(before, after, after, average_attn_weights=False)[1]
    gated = torch.stack([a[..., j] - a[..., j] * a[..., 0] for j in range(10)], -1)
    assert torch.allclose(attn.weights(before, after), gated, atol=1e-12)
    v = attn.v(after).view(2, 10, heads, -1).transpose(1, 2)
    y = attn.out((gated @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(attn(before, after), y, atol=1e-12)


def test_the_patches_get_between_nothing_and_all(pair):
    before, after = pair
    attn = make()
    for scale in (0.0, 1.0, 30.0):
        total = attn.weights(scale * before, after)[..., 1:].sum(-1)
        assert ((total >= 0) & (total <= 1)).all()


def lean(attn, towards):
    """Make every query match token ``towards`` of what it reads, marked by channel 0, and nothing else."""
    with torch.no_grad():
        for p in (attn.q.weight, attn.k.weight, attn.q.bias, attn.k.bias):
            p.zero_()
        attn.q.bias[0], attn.k.weight[0, 0] = 100.0, towards


def test_attention_on_the_class_token_closes_the_layer(pair):
    before, after = (t.index_fill(2, torch.tensor(0), 0.0) for t in pair)
    after[:, 0, 0] = 10.0
    attn = make()
    lean(attn, 1.0)
    closed = attn(before[:, :1], after.requires_grad_())
    assert torch.allclose(closed, attn.out.bias.expand_as(closed), atol=1e-12)
    assert torch.autograd.grad(closed.sum(), after)[0].abs().max() < 1e-12
    lean(attn, -1.0)  # and all on the patches opens it
    assert torch.allclose(attn.weights(before[:, :1], after)[..., 1:].sum(-1), torch.ones(2, 1, 1).double())


def test_a_zero_map_gives_the_same_for_all_images(pair):
    attn = make()
    zero = torch.zeros(2, 1, 1, 10, dtype=torch.double)
    before, after = (t.requires_grad_() for t in pair)
    y = attn.read(zero, before[:, :1], after)
    assert torch.equal(y[0], y[1])
    grads = torch.autograd.grad(y.sum(), (before, after), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_an_edited_map_reads_the_patch_it_names(pair):
    before, after = pair
    attn, edit = make(), torch.zeros(2, 1, 1, 10, dtype=torch.double)
    edit[..., 7] = 1.0
    assert torch.allclose(attn.read(edit, before[:, :1], after)[:, 0], attn.out(attn.v(after[:, 7])), atol=1e-12)


def test_a_masked_class_token_leaves_the_gate_open(pair):
    before, after = pair
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[:, 0] = False
    total = make().weights(before, after, mask=keep)[..., 1:].sum(-1)
    assert torch.allclose(total, torch.ones_like(total))


def test_the_localisation_loss_asks_for_the_direction_of_the_map(pair):
    a = torch.rand(2, 1, 1, 10, dtype=torch.double)
    assert localisation_loss(a, 3 * a[:, 0]).item() == pytest.approx(0)
    target = torch.zeros(2, 1, 10)
    target[:, :, 4] = 1
    expected = 1 - (a[:, 0, 0, 4] / a[:, 0, 0].norm(dim=-1)).mean()
    assert localisation_loss(a, target).item() == pytest.approx(expected.item())
    assert localisation_loss(0.3 * a, target).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_a_closed_layer_has_found_that_nothing_changed(dtype, pair):
    before, after = (t.index_fill(2, torch.tensor(0), 0.0) for t in pair)
    after[:, 0, 0] = 10.0
    attn = make()
    lean(attn, 1.0)
    a = attn.to(dtype).weights(before[:, :1].to(dtype), after.to(dtype))
    assert not a.any()
    unchanged = torch.eye(10)[:1].expand(2, 1, 10)
    assert localisation_loss(a, unchanged).item() == pytest.approx(0)
    assert localisation_loss(a, unchanged.flip(-1)).item() == pytest.approx(1)
