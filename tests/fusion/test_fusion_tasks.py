"""The evidence tasks of the fusion rows and of TimeXer ask what they say they ask."""

import pytest
import torch
from torch.nn import functional as F

from crosslight import tasks
from crosslight.tasks import Entrant, two_scales

ENTRANTS = {
    "two-sources": "multi-source-decoder",
    "two-scales": "crossvit",
    "topic-match": "poly-encoder",
    "driven-series": "timexer",
}


@pytest.mark.parametrize("name", ENTRANTS)
def test_batches_follow_the_seed_and_every_parameter_is_trained(name):
    task = tasks.get(name)
    first, again, other = (next(task.batches(seed, 8)) for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in first)
    for id in ("none", ENTRANTS[name]):
        model = task.model(Entrant(id), task.size)
        task.loss(model, first).backward()
        assert id == "none" or all(p.grad is not None for p in model.parameters())
        assert task.loss(model, task.example()).isfinite()
        with torch.no_grad():
            assert task.metric in task.evaluate(model.eval())


def test_two_sources_hides_the_second_one_from_the_baseline():
    task = tasks.get("two-sources")
    batch = next(task.batches(0, 8))
    assert torch.equal(batch["y"], 2 * batch["first"] + batch["second"].flip(1))
    for id, hidden in (("none", True), ("multi-source-decoder", False)):
        model = task.model(Entrant(id), task.size)
        a = model(batch["first"], batch["second"], batch["y"])
        assert torch.equal(a, model(batch["first"], 1 - batch["second"], batch["y"])) == hidden


def test_two_scales_needs_both_branches():
    batch = two_scales.draw(400, torch.Generator().manual_seed(0))
    # The stripes alone say nothing, and the means over 2 x 2 pixels do not hold them.
    rows = (batch["x"][:, 0, ::2] - batch["x"][:, 0, 1::2]).mean((1, 2)).abs()
    vertical = rows < 0.5
    assert 0.4 < vertical.float().mean() < 0.6
    coarse = F.avg_pool2d(batch["x"], 2)
    brightness = coarse.mean((1, 2, 3))
    assert brightness[vertical].mean().item() == pytest.approx(brightness[~vertical].mean().item(), abs=0.05)
    for kind in (vertical, ~vertical):
        assert torch.bincount(batch["y"][kind], minlength=3).min() > 40


def test_topic_match_shares_a_topic_but_no_word_with_the_right_candidate():
    task = tasks.get("topic-match")
    batch = task._draw(16, torch.Generator().manual_seed(0))
    assert batch["context"].shape == (16, 24)
    assert batch["candidates"].shape == (16, 50, 4)
    for context, candidates in zip(batch["context"], batch["candidates"], strict=True):
        assert not set(context.tolist()) & set(candidates.flatten().tolist())
        topics = set((context // 8).tolist())
        assert len(topics) == 6
        assert set((candidates[0] // 8).tolist()) < topics
        assert not topics & set((candidates[1:] // 8).flatten().tolist())


def test_driven_series_follows_what_the_drivers_have_already_done():
    task = tasks.get("driven-series")
    batch = task._draw(2000, torch.Generator().manual_seed(0))
    driver = batch["exogenous"][:, -24:]
    follows = torch.tanh(driver[..., 0]) + 0.5 * driver[..., 1]
    rest = batch["y"][..., 0] - follows  # the wave, variance 1/8, and noise, 1/100
    assert rest.var().item() == pytest.approx(0.135, rel=0.1)
    assert batch["y"].var().item() > 4 * rest.var().item()
