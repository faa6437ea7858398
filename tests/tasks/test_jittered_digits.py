"""Digits in changing light: only brightness and contrast differ, and Dual PatchNorm enters as its network."""

import pytest
import torch

from crosslight import tasks
from crosslight.attention.dual_patchnorm import ViT
from crosslight.errors import CrosslightError
from crosslight.tasks import Entrant, Size
from crosslight.tasks.trunk import Pooled

pytest.importorskip("sklearn")
SMALL = Size(dim=16, heads=2, depth=1)


def test_an_image_changes_in_brightness_and_contrast_alone():
    plain, task = next(tasks.get("digits").batches(0, 32)), tasks.get("jittered-digits", contrast=3.0, brightness=0.5)
    batch = next(task.batches(0, 32))
    assert torch.equal(batch["y"], plain["y"])
    x, seen = plain["x"], batch["x"].flatten(1)
    a = (seen.amax(1) - seen.amin(1)) / (x.amax(1) - x.amin(1))
    b = seen.amin(1) - a * x.amin(1)
    torch.testing.assert_close(seen, a[:, None] * x + b[:, None])
    assert ((a > 1 / 3) & (a < 3)).all()
    assert ((b > -1e-5) & (b < 0.5)).all()
    assert a.std() > 0.1
    assert b.std() > 0.05


def test_held_out_images_are_the_same_each_time():
    task = tasks.get("jittered-digits")
    assert torch.equal(task._held_out()["x"], task._held_out()["x"])
    assert task._held_out()["x"].shape == (360, 1, 8, 8)


def test_a_row_about_the_embedding_enters_as_its_network_and_a_layer_in_the_trunk():
    task = tasks.get("jittered-digits")
    network = task.model(Entrant("dual-patchnorm", {"norms": "pre"}), SMALL)
    assert isinstance(network, ViT)
    assert network.embed.pre.normalized_shape == (16,)
    assert isinstance(network.embed.post, torch.nn.Identity)
    assert len(network.blocks) == 1
    assert isinstance(task.model(Entrant("softmax"), SMALL), Pooled)


@pytest.mark.parametrize("id", ["none", "softmax", "dual-patchnorm"])
def test_loss_and_metric(id):
    task = tasks.get("jittered-digits")
    model = task.model(Entrant(id), SMALL)
    task.loss(model, next(task.batches(0, 4))).backward()
    with torch.no_grad():
        assert 0 <= task.evaluate(model.eval())["accuracy"] <= 1
    assert len(task.labels(task.example())["rows"]) == 4


def test_bad_contrast_is_an_error():
    with pytest.raises(CrosslightError, match=r"contrast: got 0\.5"):
        tasks.get("jittered-digits", contrast=0.5)
