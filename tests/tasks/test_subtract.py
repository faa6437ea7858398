"""The subtract task: its answers, and the bound on weights that are positive."""

import torch

from crosslight import tasks
from crosslight.tasks import Entrant


def test_the_answer_is_the_difference_of_the_two_asked_values():
    batch = next(tasks.get("subtract").batches(0, 32))
    for keys, values, asked, y in zip(batch["keys"], batch["values"], batch["asked"], batch["y"], strict=True):
        a, b = (values[keys == key].squeeze(0) for key in asked)
        assert asked[0] != asked[1]
        torch.testing.assert_close(a - b, y)
        assert sorted(keys.tolist()) == list(range(8))


def test_the_entrant_has_one_head():
    task = tasks.get("subtract")
    assert task.model(Entrant("softmax"), task.size).entrant.heads == 1


def test_predicting_nothing_scores_zero():
    task = tasks.get("subtract")
    model = task.model(Entrant("none"), task.size)
    torch.nn.init.zeros_(model.out.bias)
    with torch.no_grad():
        assert abs(task.evaluate(model)["r2"]) < 1e-6
