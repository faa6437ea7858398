"""Bags of digits: ACMIL enters as its network with its own loss, a layer by a learned query."""

import pytest
import torch
from torch.nn import functional as F

from crosslight import tasks
from crosslight.attention.acmil import BagClassifier
from crosslight.tasks import Entrant, Size
from crosslight.tasks.pooled_bags import Pooling

pytest.importorskip("sklearn")
SMALL = Size(dim=16, heads=2, depth=1)


def build(id, **options):
    torch.manual_seed(0)
    return tasks.get("pooled-bags").model(Entrant(id, options), SMALL)


def test_the_bags_are_those_of_digit_bags():
    one, other = (next(tasks.get(name).batches(3, 8)) for name in ("digit-bags", "pooled-bags"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_acmil_is_trained_by_its_own_loss():
    task, model = tasks.get("pooled-bags"), build("acmil", top=5)
    assert isinstance(model, BagClassifier)
    assert (model.attend.heads, model.attend.top, model.attend.dim) == (5, 5, 16)
    batch, model = next(task.batches(0, 8)), model.eval()
    logits = model(batch["x"])[0]
    assert task.loss(model, batch) > F.cross_entropy(logits, batch["y"])  # the branches and their likeness
    task.loss(model, batch).backward()
    assert all(p.grad.abs().sum() > 0 for head in model.branch_heads for p in head.parameters())


@pytest.mark.parametrize("id", ["softmax", "agent-attention"])
def test_a_layer_reads_the_bag_by_one_query(id):
    task, model = tasks.get("pooled-bags"), build(id)
    assert isinstance(model, Pooling)
    batch = next(task.batches(0, 8))
    (logits,) = model(batch["x"])
    assert logits.shape == (8, 2)
    torch.testing.assert_close(model(batch["x"].flip(1))[0], logits)  # a bag has no order
    task.loss(model, batch).backward()


@pytest.mark.parametrize("id", ["none", "softmax", "acmil"])
def test_the_metric_is_an_area_under_a_curve(id):
    with torch.no_grad():
        assert 0 <= tasks.get("pooled-bags").evaluate(build(id).eval())["auc"] <= 1
