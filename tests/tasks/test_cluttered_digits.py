"""Cluttered digits: the same scenes for the same seed, held-out digits kept apart, one map in each branch."""

import pytest
import torch

from crosslight import tasks
from crosslight.maps.eca import ECA
from crosslight.tasks import Entrant

pytest.importorskip("sklearn")


def test_scenes_depend_on_the_seed_alone():
    task = tasks.get("cluttered-digits")
    first, same, other = (next(task.batches(seed, 4)) for seed in (1, 1, 2))
    assert torch.equal(first["x"], same["x"])
    assert torch.equal(first["y"], same["y"])
    assert not torch.equal(first["x"], other["x"])


def test_the_digit_stands_whole_in_the_scene():
    from crosslight.tasks.digits import load

    task = tasks.get("cluttered-digits", fragments=0, noise=0.0)
    known = {tuple(digit.tolist()): int(label) for digit, label in zip(*load(), strict=True)}
    batch = next(task.batches(0, 8))
    for scene, label in zip(batch["x"][:, 0], batch["y"], strict=True):
        windows = scene.unfold(0, 8, 1).unfold(1, 8, 1).flatten(0, 1).flatten(1)
        assert int(label) in {known.get(tuple(window.tolist())) for window in windows}


def test_the_entrant_is_in_each_branch_and_the_trunk_is_the_same():
    task = tasks.get("cluttered-digits")
    plain, gated = task.model(Entrant("none"), task.size), task.model(Entrant("eca"), task.size)
    maps = [module for module in gated.modules() if isinstance(module, ECA)]
    assert [m.channels for m in maps] == [12, 24, 48]
    own = sum(p.numel() for m in maps for p in m.parameters())
    assert sum(p.numel() for p in gated.parameters()) - own == sum(p.numel() for p in plain.parameters())
    assert task.loss(gated, next(task.batches(0, 4))).isfinite()
    with torch.no_grad():
        assert 0 <= task.evaluate(plain.eval())["accuracy"] <= 1
