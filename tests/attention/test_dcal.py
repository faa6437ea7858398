"""Dual cross-attention: who asks, the pair of images, rollout, the network against timm."""

import math

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention import dcal
from crosslight.attention.dcal import DualViT, UncertaintyLoss, rollout, strongest
from crosslight.errors import CrosslightError
from crosslight.testing import flops

DIM, HEADS, N = 12, 3, 9


def make(**options):
    return crosslight.create("dcal", **{"dim": DIM, "heads": HEADS, "ratio": 0.3, **options}).double()


def plain(attn):
    """torch's attention with the weights of ours."""
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        theirs.out_proj.load_state_dict(attn.out.state_dict())
    return theirs


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


def test_with_all_tokens_asking_it_is_plain_attention(x):
    attn = make(ratio=1.0)
    assert torch.allclose(attn(x), plain(attn)(x, x, x)[0], atol=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_the_tokens_that_cls_reads_most_ask(ratio, x):
    attn = make(ratio=ratio)
    y, a = plain(attn)(x, x, x)
    for b in range(2):
        ranked = a[b, 0, 1:].argsort(descending=True) + 1
        asking = [0, *sorted(ranked[: math.ceil(ratio * (N - 1))].tolist())]
        assert attn.local(x)[b].tolist() == asking
        assert torch.allclose(attn(x)[b, asking], y[b, asking], atol=1e-12)
        quiet = [i for i in range(N) if i not in asking]
        assert torch.allclose(attn(x)[b, quiet], attn.out.bias.expand(len(quiet), -1))
        assert not attn.weights(x)[b, :, quiet].any()


def test_importance_from_below_ranks(x):
    attn = make()
    importance = torch.rand(2, N, dtype=torch.double)
    importance[:, 0] = -1  # CLS asks in any case
    with attn.ranked_by(importance):
        asking = attn.local(x)
        assert torch.allclose(attn.read(attn.weights(x), x), attn(x), atol=1e-12)
    for b in range(2):
        expected = sorted((importance[b, 1:].argsort(descending=True)[:3] + 1).tolist())
        assert asking[b].tolist() == [0, *expected]
    with attn.ranked_by(importance[:, 1:]), pytest.raises(CrosslightError, match="importance: got"):
        attn(x)


def test_padding_does_not_ask(x):
    attn, keep = make(ratio=0.4), torch.arange(N) < torch.tensor([[5], [N]])
    weights = attn.weights(x, mask=keep)[0]
    assert not weights[:, :, 5:].any()
    assert (weights.sum((0, 2)) > 0).tolist() == [True] * 5 + [False] * 4  # four of eight ask: those that are there


def test_pair_reads_both_images(x):
    attn, other = make(), torch.randn(2, N + 2, DIM, dtype=torch.double)
    pair = torch.cat([x, other], 1)
    assert torch.allclose(attn(x, pair), plain(attn)(x, pair, pair)[0], atol=1e-12)
    own = torch.arange(2 * N + 2) < N
    alone = attn(x, pair, mask=own.expand(2, -1))
    assert torch.allclose(alone, plain(attn)(x, x, x)[0], atol=1e-12)


def test_rollout_is_the_product_of_the_layers():
    attentions = [torch.rand(2, HEADS, N, N, dtype=torch.double).softmax(-1) for _ in range(3)]
    first, second, third = ((a.mean(1) + torch.eye(N)) / 2 for a in attentions)
    total = rollout(attentions)
    assert torch.allclose(total, third @ second @ first)
    assert torch.allclose(total.sum(-1), torch.ones(2, N).double())


def test_fewer_queries_cost_less():
    work = [flops.measure(lambda r=r: make(ratio=r).float()(torch.randn(1, 512, DIM))).flops for r in (0.1, 1.0)]
    projections = 4 * 2 * 512 * DIM**2
    assert (work[0] - projections) < 0.15 * (work[1] - projections)


def network(**options):
    return DualViT(DIM, 2, HEADS, **{"image": 16, "patch": 4, "classes": 5, "ratio": 0.25, **options}).eval()


def test_self_attention_branch_is_timms_vit():
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=DIM, depth=2, num_heads=HEADS, num_classes=5
    ).eval()
    ours, state = network(), {}
    for name, value in theirs.state_dict().items():
        name = name.replace("patch_embed.proj", "embed").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        name = name.replace("cls_token", "cls").replace("pos_embed", "positions").replace("attn.proj", "attend.out")
        if "qkv" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attend.{letter}")] = part
        else:
            state[name] = value
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("local_") for name in missing)
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(ours(images)[0], theirs(images), atol=1e-5)


def test_local_branch_is_a_block_on_the_rows_that_ask():
    model = network().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    x, total = model._tokens(images), torch.eye(17, dtype=torch.double)
    for block in model.blocks:
        z = block.norm1(x)
        y, a = plain(block.attend)(z, z, z)
        total = (a + torch.eye(17)) / 2 @ total
        x = x + y
        x = x + block.mlp(block.norm2(x))
    block = model.local_block
    z = block.norm1(x)
    y = x + plain(block.attend)(z, z, z)[0]
    y = model.local_norm(y + block.mlp(block.norm2(y)))
    assert torch.allclose(model(images)[1], model.local_head(y[:, 0]), atol=1e-10)
    # The block hands on CLS and the four tokens (of 16) that the rollout ranks first, all of them.
    best = total[:, 0, 1:].argsort(1, descending=True)[:, :4].sort(1).values + 1
    rows = torch.stack([t[[0, *index]] for t, index in zip(y, best.tolist(), strict=True)])
    assert torch.allclose(model.local_norm(block.local(x, total[:, 0])), rows, atol=1e-10)


def test_tokens_are_ranked_once(monkeypatch):
    calls, block = [], network().local_block
    monkeypatch.setattr(dcal, "strongest", lambda *given: calls.append(given) or strongest(*given))
    importance = torch.rand(2, 17)
    y = block.local(torch.randn(2, 17, DIM), importance)
    assert (len(calls), y.shape) == (1, (2, 5, DIM))
    with pytest.raises(CrosslightError, match="importance: got"):
        block.local(torch.randn(2, 17, DIM), importance[:, 1:])


def test_pairs_add_no_parameters_and_disturb():
    model = network()
    images, pair = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    own, local, disturbed = model(images, pair)
    again = model(images)
    assert torch.equal(own, again[0])
    assert torch.equal(local, again[1])
    assert not torch.allclose(disturbed, own, atol=1e-4)
    # A distractor that is the image itself doubles every key and changes nothing.
    assert torch.allclose(model(images, images)[2], own, atol=1e-5)


def test_network_is_a_vit_and_one_block_with_a_head():
    with torch.device("meta"):
        count = sum(p.numel() for p in crosslight.create("dcal", preset="deit_tiny").parameters())
    block = 12 * 192**2 + 13 * 192
    assert count == 5_717_416 + block + 2 * 192 + 192 * 1000 + 1000


def test_uncertainty_weighs_the_losses():
    loss = UncertaintyLoss()
    losses = [torch.tensor(t) for t in (1.0, 2.0, 4.0)]
    assert loss(*losses) == 3.5
    with torch.no_grad():
        loss.w.copy_(torch.tensor([0.5, -1.0, 2.0]))
    expected = sum(math.exp(-w) * t + w for w, t in zip((0.5, -1.0, 2.0), (1, 2, 4), strict=True)) / 2
    assert math.isclose(loss(*losses).item(), expected, rel_tol=1e-5)
    with pytest.raises(CrosslightError, match="losses: got 2"):
        loss(*losses[:2])


def test_bad_ratio_is_named():
    with pytest.raises(CrosslightError, match="ratio: got 0"):
        make(ratio=0)
