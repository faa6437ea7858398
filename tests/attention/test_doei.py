"""DOEI: plain attention at strength 0, trust written out patch by patch, what is known of classes and colours."""

import math

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.doei import Rule, affinity, confidence, rebuild
from crosslight.errors import CrosslightError

DIM, HEADS, C, P = 8, 2, 3, 6
N = C + P


def make(**options):
    return crosslight.create("doei", **{"dim": DIM, "heads": HEADS, "classes": C, "strength": 0.4, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


@pytest.fixture
def attention():
    return (2 * torch.randn(2, N, N, dtype=torch.double)).softmax(-1)


@pytest.fixture
def colours():
    return torch.rand(2, P, 3, dtype=torch.double)


def plain(attn):
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        theirs.out_proj.load_state_dict(attn.out.state_dict())
    return theirs


def test_strength_zero_is_plain_attention(x):
    attn, softmax = make(strength=0), crosslight.create("softmax", dim=DIM, heads=HEADS).double()
    softmax.load_state_dict(attn.state_dict())  # the same parameters, no more
    assert torch.equal(attn(x), softmax(x))
    assert torch.allclose(attn(x), plain(attn)(x, x, x)[0], atol=1e-12)


def test_layer_is_attention_and_the_change(x, colours):
    attn, present = make(), torch.tensor([[True, False, True], [True, True, True]])
    y, a = plain(attn)(x, x, x)
    with attn.given(present, colours):
        changed = attn(x)
    expected = y + 0.4 * rebuild(x, a, C, present=present, colours=colours)
    assert torch.allclose(changed, expected, atol=1e-12)
    assert not torch.allclose(changed, attn(x), atol=1e-6)


def test_change_is_written_out(x, attention, colours):
    rule = Rule(high=0.3, low=0.2, damp=0.7, mix=(0.5, 1.0, 2.0), sigma=0.3)
    present = torch.tensor([[True, False, True], [True, True, True]])
    ours = rebuild(x, attention, C, present=present, colours=colours, rule=rule)
    amplified = damped = rejected = 0
    for b in range(2):
        a, e, rgb = attention[b], x[b, C:], colours[b]
        alike = {(i, j): (a[C + i, C + j] + a[C + j, C + i]) / 2 for i in range(P) for j in range(P) if i != j}
        top = max(alike.values())

        def near(i, j, e=e, rgb=rgb, alike=alike, top=top):
            if i == j:
                return 1.0
            colour = math.exp(
                -sum((p - q) ** 2 for p, q in zip(rgb[i].tolist(), rgb[j].tolist(), strict=True)) / (2 * 0.3**2)
            )
            cosine = max(float(torch.cosine_similarity(e[i], e[j], 0)), 0)
            return (0.5 * colour + cosine + 2 * float(alike[i, j] / top)) / 3.5

        conf = {k: [float(a[k, C + j] / a[k, C:].max()) if present[b, k] else 0.0 for j in range(P)] for k in range(C)}
        for j in range(P):
            row = [near(j, i) for i in range(P)]
            share = [r / sum(row) for r in row]
            gains = [0.0]
            for k in range(C):
                support = sum(share[i] * conf[k][i] for i in range(P))
                if conf[k][j] >= 0.3 and support >= sum(conf[k]) / P:
                    gains.append(conf[k][j])
                rejected += conf[k][j] >= 0.3 and support < sum(conf[k]) / P
            best = max(conf[k][j] for k in range(C))
            loss = 0.7 * max(1 - best / 0.2, 0)
            amplified, damped = amplified + (max(gains) > 0), damped + (loss > 0)
            expected = max(gains) * sum(share[i] * e[i] for i in range(P)) - loss * e[j]
            assert torch.allclose(ours[b, C + j], expected, atol=1e-10)
        here = [k for k in range(C) if present[b, k]]
        given = {k: a[C:, k].mean() for k in here}
        for k in range(C):
            expected = torch.zeros(DIM, dtype=torch.double)
            if k in here:
                expected = given[k] / max(given.values()) * x[b, k]
                total = sum(a[k, i] for i in here)
                expected = expected - sum(a[k, i] / total * x[b, i] for i in here if i != k)
            assert torch.allclose(ours[b, k], expected, atol=1e-10)
    assert amplified
    assert damped
    assert rejected


def test_only_confident_patches_change(x):
    a = torch.zeros(2, N, N, dtype=torch.double)
    a[:, 1, C + 4] = 1.0
    change = rebuild(x, a, C, rule=Rule(damp=0))[:, C:]
    assert ((change != 0).any(-1) == (torch.arange(P) == 4)).all()


def test_absent_classes_contribute_nothing(x, attention):
    present = torch.tensor([[False, True, False]] * 2)
    change = rebuild(x, attention, C, present=present)
    assert not change[:, [0, 2]].any()
    other = attention.clone()
    other[:, [0, 2]] = torch.rand(2, 2, N, dtype=torch.double)  # what the absent classes read
    moved = x.clone()
    moved[:, [0, 2]] = 5.0
    assert torch.equal(rebuild(moved, other, C, present=present), change)
    assert not rebuild(x, attention, C, present=torch.zeros(2, C)).any()


def test_classes_that_read_each_other_move_apart(x):
    a = torch.zeros(2, N, N, dtype=torch.double)
    a[:, 0, :2] = 0.5
    a[:, C:, :C] = 0.1
    change = rebuild(x, a, C)[:, 0]
    assert torch.allclose(change, x[:, 0] - 0.5 * x[:, 1])


def test_affinity_is_symmetric_with_ones_on_the_diagonal(x, attention, colours):
    h = affinity(x[:, C:], attention[:, C:, C:], colours)
    assert torch.equal(h, h.mT)
    assert (h.diagonal(dim1=1, dim2=2) == 1).all()
    assert ((h >= 0) & (h <= 1)).all()
    only = affinity(x[:, C:], attention[:, C:, C:], colours, Rule(mix=(1.0, 0.0, 0.0)))
    assert torch.allclose(only, torch.exp(-(torch.cdist(colours, colours) ** 2) / (2 * 0.15**2)), atol=1e-9)


def test_maps_are_confidence_times_scores_over_alike_patches(x):
    attn, scores = make(), torch.rand(2, C, P, dtype=torch.double)
    a = plain(attn)(x, x, x)[1]
    h = affinity(x[:, C:], a[:, C:, C:])
    r = h / h.sum(-1, keepdim=True)
    raw = a[:, :C, C:] / a[:, :C, C:].amax(-1, keepdim=True) * scores
    expected = torch.einsum("bji,bki->bkj", r, raw)
    assert torch.allclose(attn.cam(x, scores), expected, atol=1e-12)
    with attn.given(torch.tensor([[True, False, True]] * 2)):
        assert not attn.cam(x, scores)[:, 1].any()
    assert confidence(a, C, torch.ones(2, C)).amax(-1).eq(1).all()


def test_padding_is_as_if_it_were_not_there(x):
    attn, keep = make(), torch.arange(N) < torch.tensor([[N - 2], [N]])
    assert torch.allclose(attn(x, mask=keep)[0, :-2], attn(x[:1, :-2])[0], atol=1e-12)


def test_bad_options_are_named():
    for name, value in (("classes", 0), ("sigma", 0), ("mix", (1.0, 0.0)), ("mix", (1.0, 0.0, 0.0, 1.0))):
        with pytest.raises(CrosslightError, match=f"{name}: got"):
            make(**{name: value})
    with pytest.raises(CrosslightError, match="low, high: got"):
        make(low=0.6)
