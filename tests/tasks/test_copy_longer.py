"""Longer copies: short in training, long after it, and nothing in the model that knows a length."""

import pytest
import torch

from crosslight import tasks
from crosslight.errors import CrosslightError
from crosslight.tasks import Entrant, Size

SMALL = Size(dim=16, heads=2, depth=1)


def test_training_is_short_and_held_out_is_long():
    task = tasks.get("copy-longer", length=6, test_length=20)
    batches = task.batches(0, 4)
    assert {next(batches)["source"].shape[1] for _ in range(50)} == {3, 4, 5, 6}
    assert task._held_out()["source"].shape == (128, 20)
    assert task.example()["source"].shape == (1, 20)


def test_batches_depend_on_the_seed_alone():
    task = tasks.get("copy-longer")
    first, same = task.batches(1, 4), task.batches(1, 4)
    for _ in range(3):
        assert torch.equal(next(first)["source"], next(same)["source"])
    assert not torch.equal(next(first)["source"][:, :5], next(task.batches(2, 4))["source"][:, :5])


def test_logits_at_a_symbol_do_not_depend_on_what_comes_after_it_in_the_target():
    torch.manual_seed(0)
    model = tasks.get("copy-longer").model(Entrant("softmax"), SMALL).eval()
    source = torch.randint(1, 17, (2, 12))
    target = torch.randint(1, 17, (2, 12))
    changed = torch.cat([target[:, :5], target[:, 5:].flip(1)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(source, target)[:, :5], model(source, changed)[:, :5])
        assert not torch.allclose(model(source, target)[:, :5], model(source.flip(1), target)[:, :5])


@pytest.mark.parametrize(
    "entrant",
    [
        Entrant("none"),
        Entrant("softmax"),
        Entrant("monotonic-location-attention", {"start": -1, "content": False}),
        Entrant("dca-gmm-attention", {"form": "dca", "heads": 1, "hidden": 8}),
    ],
)
def test_scores_at_both_lengths(entrant):
    task = tasks.get("copy-longer", length=4, test_length=9)
    model = task.model(entrant, SMALL)
    task.loss(model, next(task.batches(0, 4))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert set(task.evaluate(model.eval())) == {"accuracy", "accuracy_trained"}


def test_without_an_entrant_the_source_is_not_seen():
    model = tasks.get("copy-longer").model(Entrant("none"), SMALL)
    source, target = torch.randint(1, 17, (2, 6)), torch.randint(1, 17, (2, 6))
    assert torch.equal(model(source, target), model(source.flip(1), target))


def test_a_shorter_test_is_an_error():
    with pytest.raises(CrosslightError, match="test_length: got 3"):
        tasks.get("copy-longer", length=4, test_length=3)
