"""The argmax probe: nothing but the entrant can know the order."""

import pytest
import torch

from crosslight import tasks
from crosslight.tasks import Entrant


@pytest.mark.parametrize(("id", "knows"), [("softmax", False), ("mean-pooling", False), ("dual-triangle", True)])
def test_only_an_entrant_that_knows_the_order_can_answer(id, knows):
    task = tasks.get("argmax-probe")
    model = task.model(Entrant(id), task.size).double()
    x = torch.rand(4, 8, 1, dtype=torch.float64)
    moved = (model(x.flip(1)) - model(x)).abs().max().item()
    assert (moved > 1e-6) == knows


def test_the_answer_is_the_place_of_the_largest():
    batch = next(tasks.get("argmax-probe", length=5).batches(0, 16))
    assert batch["x"].shape == (16, 5)
    torch.testing.assert_close(batch["x"].gather(1, batch["y"][:, None]).squeeze(1), batch["x"].amax(1))
