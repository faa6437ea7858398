"""Tasks of kinds explain, control and training: right answers in the data, seeded order, models that run."""

import itertools

import pytest
import torch

from crosslight import tasks
from crosslight.tasks import Entrant, Size

SMALL = Size(dim=16, heads=2, depth=2)
ENTRANTS = {
    "digit-bags": Entrant("aem", {"weight": 0.1}),
    "planted-sink": Entrant("var-visual-sink", {"image": (0, 16), "dims": (0, 1), "tau": 2.0}),
    "pointer-vqa": Entrant("chefer-mm-explain"),
    "prune-heads": Entrant("sixteen-heads"),
}


@pytest.mark.parametrize("name", ENTRANTS)
def test_batches_follow_the_seed_alone(name):
    task = tasks.get(name)
    first, again, other = (list(itertools.islice(task.batches(seed, 4), 2)) for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)
    assert any(not torch.equal(a[k], b[k]) for a, b in zip(first, other, strict=True) for k in a)


@pytest.mark.parametrize("name", ENTRANTS)
@pytest.mark.parametrize("with_entrant", [True, False])
def test_trains_and_is_judged(name, with_entrant):
    task = tasks.get(name)
    model = task.model(ENTRANTS[name] if with_entrant else Entrant("none"), SMALL)
    loss = task.loss(model, next(task.batches(0, 4)))
    loss.backward()
    assert loss.isfinite()
    # (The image stream of the last layer of pointer-vqa feeds nothing.)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 10 - 4 * (name == "digit-bags")
    with torch.no_grad():
        scores = task.evaluate(model.eval())
    assert task.metric in scores
    assert all(torch.tensor(v).isfinite() for v in scores.values())


def test_lookup_answers_are_the_values_of_the_keys():
    batch = next(tasks.get("prune-heads").batches(0, 50))
    asked = batch["keys"][:, -1:]
    place = (batch["keys"][:, :-1] == asked).int().argmax(-1, keepdim=True)
    assert torch.equal(batch["values"].gather(1, place).squeeze(1), batch["y"])


def test_vqa_answers_are_the_colours_of_the_asked_shapes():
    batch = next(tasks.get("pointer-vqa").batches(0, 50))
    place = (batch["shapes"] == batch["words"][:, 2:3]).int().argmax(-1, keepdim=True)
    assert torch.equal(batch["colours"].gather(1, place).squeeze(1), batch["y"])


def test_the_planted_sink_is_an_empty_cell():
    task = tasks.get("planted-sink")
    batch = next(task.batches(0, 50))
    assert (batch["shapes"].gather(1, batch["sink"][:, None]) == task.shapes).all()
    place = (batch["shapes"] == batch["asked"][:, None]).int().argmax(-1, keepdim=True)
    assert torch.equal(batch["colours"].gather(1, place).squeeze(1), batch["y"])


def test_bags_are_positive_where_they_hold_a_positive_digit():
    from crosslight.tasks.digit_bags import POSITIVE, bags
    from crosslight.tasks.digits import load

    x, y = load()
    found, label, where = bags(x, y, 20, 10, 2, seed=3)
    assert torch.equal(where.any(1).long(), label)
    digit = {tuple(image.tolist()): int(d) for image, d in zip(x, y, strict=True)}
    for bag, hits in zip(found, where, strict=True):
        assert [digit[tuple(i.tolist())] in POSITIVE for i in bag] == hits.tolist()
