"""The shapes task: pictures that fit their labels, and a score that is 1 for the true masks."""

import pytest
import torch
from torch import nn

from crosslight import tasks
from crosslight.tasks import Entrant


def test_a_label_is_one_colour_and_a_colour_one_label():
    batch = next(tasks.get("shapes-ari").batches(0, 16))
    for x, label in zip(batch["x"], batch["label"], strict=True):
        seen = {(int(label[y, c]), tuple(x[:, y, c].tolist())) for y in range(12) for c in range(12)}
        assert len(seen) == len({number for number, _ in seen}) == len({colour for _, colour in seen})
        assert (0, (0.0, 0.0, 0.0)) in seen
        assert 2 <= len(seen) <= 4


class Oracle(nn.Module):
    """Knows the shapes by their colours, or gives everything to one slot."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows, self.unused = knows, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        colour = (x.flatten(2) * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)).sum(1).long()
        mask = nn.functional.one_hot(colour if self.knows else colour * 0, 8).mT.float()
        return x, mask


def test_true_masks_score_one_and_a_single_mask_hardly_anything():
    pytest.importorskip("sklearn")
    task = tasks.get("shapes-ari")
    assert task.evaluate(Oracle(True)) == {"ari": 1.0, "mse": 0.0}
    assert task.evaluate(Oracle(False))["ari"] < 0.2


@pytest.mark.parametrize("entrant", [Entrant("slot-attention", {"slots": 3}), Entrant("softmax"), Entrant("none")])
def test_masks_are_shares_of_each_pixel(entrant):
    task = tasks.get("shapes-ari")
    model = task.model(entrant, task.size)
    batch = next(task.batches(0, 2))
    picture, mask = model(batch["x"])
    assert picture.shape == batch["x"].shape
    assert mask.shape == (2, 3 if entrant.id == "slot-attention" else 4, 144)
    torch.testing.assert_close(mask.sum(1), torch.ones(2, 144))
    task.loss(model, batch).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
