"""ACMIL: the pooling written out, masking in training, the loss on branches, the network."""

import pytest
import torch
from torch.nn import functional as F

import crosslight
from crosslight.attention.acmil import BagClassifier, diversity
from crosslight.errors import CrosslightError

DIM, HEADS, WIDTH, M = 8, 3, 6, 20


def make(**options):
    options = {"dim": DIM, "heads": HEADS, "context_dim": WIDTH, "attention_dim": 5, **options}
    return crosslight.create("acmil", **options).double()


@pytest.fixture
def bag():
    return torch.randn(2, M, WIDTH, dtype=torch.double)


def branches(attn, bag):
    """Instances and distributions of every branch, one bag and instance at a time."""
    h = torch.stack([torch.stack([(attn.reduce.weight @ z).clamp(min=0) for z in b]) for b in bag])
    s = torch.zeros(len(bag), attn.heads, M, dtype=torch.double)
    for b in range(len(bag)):
        for j in range(M):
            gate = 1 / (1 + (-(attn.u.weight @ h[b, j] + attn.u.bias)).exp())
            s[b, :, j] = attn.branches.weight @ ((attn.v.weight @ h[b, j] + attn.v.bias).tanh() * gate)
    e = s.exp()
    return h, e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("heads", [1, 3])
def test_pooling_is_gated_attention_of_each_branch(heads, bag):
    """One branch is ABMIL."""
    attn = make(heads=heads).eval()
    h, a = branches(attn, bag)
    assert torch.allclose(attn.weights(None, bag).squeeze(2), a, atol=1e-12)
    abar = sum(a[:, k] for k in range(heads)) / heads
    expected = torch.stack([sum(abar[b, j] * h[b, j] for j in range(M)) for b in range(2)])
    assert torch.allclose(attn(None, bag).squeeze(1), expected, atol=1e-12)


def test_a_stream_that_says_nothing_asks_what_the_branches_ask(bag):
    attn = make().eval()
    x = torch.zeros(2, 4, DIM, dtype=torch.double)
    assert torch.allclose(attn(x, bag), attn(None, bag).expand(-1, 4, -1))
    torch.nn.init.normal_(x)
    assert not torch.allclose(attn(x, bag)[:, 0], attn(x, bag)[:, 1])


@pytest.mark.parametrize(("top", "share", "count"), [(10, 0.6, 6), (5, 0.5, 2), (0, 0.6, 0), (50, 0.25, 5)])
def test_masking_takes_a_share_of_the_strongest(top, share, count, bag):
    attn = make(top=top, share=share)
    before = attn.eval().weights(None, bag)
    after = attn.train().weights(None, bag)
    gone = after == 0
    assert (gone.sum(-1) == count).all()
    rank = before.argsort(-1, descending=True).argsort(-1)
    assert (rank[gone] < top).all()
    assert torch.allclose(after.sum(-1), torch.ones(2, HEADS, 1).double())
    rest = before.masked_fill(gone, 0)
    assert torch.allclose(after, rest / rest.sum(-1, keepdim=True))  # the ratios of the others stay


def test_masking_is_drawn_anew_for_each_branch_and_call(bag):
    attn = make().train()
    first, second = (attn.weights(None, bag) == 0 for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_masking_leaves_something_of_small_bags(bag):
    attn = make(top=10, share=0.6).train()
    keep = torch.arange(M) < torch.tensor([[3], [1]])
    after = attn.weights(None, bag, mask=keep)
    assert ((after > 0).sum(-1) == torch.tensor([2, 1])[:, None, None]).all()  # floor(0.6 * 3) and floor(0.6) masked
    assert torch.allclose(after.sum(-1), torch.ones(2, HEADS, 1).double())


def test_training_output_is_read_by_masked_weights(bag):
    attn = make().train()
    torch.manual_seed(3)
    y = attn(None, bag)
    torch.manual_seed(3)
    assert torch.allclose(attn.read(attn.weights(None, bag), None, bag), y)


def test_diversity():
    equal = torch.rand(2, 1, 1, M).softmax(-1).expand(-1, HEADS, -1, -1)
    assert torch.allclose(diversity(equal), torch.ones(()))
    disjoint = torch.zeros(2, HEADS, 1, M)
    for k in range(HEADS):
        disjoint[:, k, :, 4 * k : 4 * k + 4] = 0.25
    assert diversity(disjoint) == 0
    assert diversity(equal[:, :1]) == 0
    a = torch.rand(2, 4, 1, M).softmax(-1)
    pairs = [F.cosine_similarity(a[:, i], a[:, j], dim=-1).mean() for i in range(4) for j in range(i)]
    assert torch.allclose(diversity(a), sum(pairs) / 6)


def test_network_classifies_the_bag_and_every_branch(bag):
    model = BagClassifier(WIDTH, DIM, classes=4, heads=HEADS).double().eval()
    h, a = branches(model.attend, bag)
    logits, parts, weights = model(bag)
    assert torch.allclose(weights, a, atol=1e-12)
    for k, head in enumerate(model.branch_heads):
        assert torch.allclose(parts[:, k], head(torch.einsum("bj,bjd->bd", a[:, k], h)), atol=1e-12)
    assert torch.allclose(logits, model.head(torch.einsum("bkj,bjd->bd", a, h) / HEADS), atol=1e-12)
    target = torch.tensor([3, 1])
    own = sum(F.cross_entropy(parts[:, k], target) for k in range(HEADS)) / HEADS
    expected = F.cross_entropy(logits, target) + own + diversity(a.unsqueeze(2))
    assert torch.allclose(model.loss((logits, parts, weights), target), expected)
    keep = torch.arange(M) < torch.tensor([[7], [M]])
    assert torch.allclose(model(bag, keep)[0][:1], model(bag[:1, :7])[0])


def test_one_branch_is_trained_on_the_bag_alone(bag):
    model = BagClassifier(WIDTH, DIM, heads=1).double().eval()
    output, target = model(bag), torch.tensor([1, 0])
    assert torch.equal(model.loss(output, target), F.cross_entropy(output[0], target))


@pytest.mark.parametrize(
    ("preset", "features", "dim"),
    [
        ("medical_ssl", 384, 128),
        ("natural_supervised", 512, 256),
        ("path_clip_b", 512, 256),
        ("path_clip_l_336", 768, 384),
    ],
)
def test_preset_builds_a_network(preset, features, dim):
    model = crosslight.create("acmil", preset=preset, heads=5)
    reduce, gates = features * dim, 2 * (dim * 128 + 128)
    assert sum(p.numel() for p in model.parameters()) == reduce + gates + 5 * 128 + 6 * (2 * dim + 2)


def test_bad_options_are_named():
    for name, value in (("share", 1.5), ("top", -1), ("attention_dim", 0), ("heads", 0)):
        with pytest.raises(CrosslightError, match=f"{name}: got"):
            make(**{name: value})
