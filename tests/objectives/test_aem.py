"""AEM: closed gradient, limits, masks."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.errors import CrosslightError


def make(**options):
    return crosslight.create("aem", **options)


def test_gradient_is_the_closed_form():
    s = torch.randn(3, 7, dtype=torch.double, requires_grad=True)
    a = s.softmax(-1)
    make(weight=1.0).negative_entropy(a).backward()
    entropy = -(a * a.log()).sum(-1, keepdim=True)
    assert torch.allclose(s.grad, (a * (a.log() + entropy)).detach() / 3, atol=1e-12)


def test_gradient_is_zero_at_uniform_attention():
    s = torch.zeros(2, 5, dtype=torch.double, requires_grad=True)
    make(weight=1.0).negative_entropy(s.softmax(-1)).backward()
    assert s.grad.abs().max() < 1e-15


def test_weight_zero_is_cross_entropy_bit_for_bit():
    logits, y, a = torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.rand(4, 6).softmax(-1)
    assert torch.equal(make(weight=0)(logits, y, a), F.cross_entropy(logits, y))
    assert not torch.equal(make(weight=0.1)(logits, y, a), F.cross_entropy(logits, y))


def test_large_weight_drives_attention_to_uniform():
    s = torch.randn(2, 9, requires_grad=True)
    w = torch.randn(2, 9)
    optimiser = torch.optim.SGD([s], lr=0.5)
    for _ in range(300):
        a = s.softmax(-1)
        loss = make(weight=100.0)(torch.stack([(a * w).sum(-1), torch.zeros(2)], -1), torch.tensor([0, 1]), a)
        optimiser.zero_grad()
        (loss / 100).backward()
        optimiser.step()
    assert (s.softmax(-1) - 1 / 9).abs().max() < 0.02


def test_permutation_and_padding_do_not_change_it():
    aem = make(weight=1.0, normalise=True)
    a = torch.rand(2, 3, 6).softmax(-1)
    assert torch.allclose(aem.negative_entropy(a), aem.negative_entropy(a[..., torch.randperm(6)]))
    padded = torch.cat([a, torch.rand(2, 3, 4)], -1)
    mask = torch.arange(10).expand(2, 10) < 6
    assert torch.allclose(aem.negative_entropy(padded, mask), aem.negative_entropy(a))


def test_normalised_entropy_of_uniform_attention_is_one_at_any_size():
    for n in (2, 7, 100):
        assert torch.allclose(make(normalise=True).negative_entropy(torch.full((1, n), 1 / n)), torch.tensor(-1.0))


def test_zeros_in_attention_give_finite_gradients():
    a = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    make(weight=1.0).negative_entropy(a).backward()
    assert a.grad.isfinite().all()


def test_bad_input_names_the_argument():
    with pytest.raises(CrosslightError, match="weight: got -1"):
        make(weight=-1)
    with pytest.raises(CrosslightError, match=r"mask: got \(1, 3\)"):
        make().negative_entropy(torch.rand(1, 4), torch.ones(1, 3, dtype=torch.bool))
