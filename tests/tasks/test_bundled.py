"""Every task of ours that needs no file: order of data, learning signals, held-out data, labels."""

import pytest
import torch

from crosslight import tasks
from crosslight.errors import CrosslightError
from crosslight.tasks import Entrant, Size

NAMES = ["digits", "language", "forecast", "spelling", "copy", "argmax-position", "zoology-mqar"]
SMALL = Size(dim=16, heads=2, depth=1)


def build(task, id="softmax"):
    torch.manual_seed(0)
    return task.model(Entrant(id), SMALL)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_the_seed_alone(name):
    options = {"examples": 40} if name == "zoology-mqar" else {}
    first, again, other = (tasks.get(name, **options).batches(seed, 8) for seed in (0, 0, 1))
    one, two = [next(first) for _ in range(3)], [next(again) for _ in range(3)]
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    assert not equal(one[0], next(other))
    assert all(len(t) == 8 for t in one[0].values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("id", ["none", "mean-pooling", "softmax"])
def test_loss_reaches_every_parameter_and_metrics_are_there(name, id):
    task = tasks.get(name, **({"examples": 40} if name == "zoology-mqar" else {}))
    model = build(task, id)
    task.loss(model, next(task.batches(0, 4))).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent or id != "softmax"  # an entrant without queries leaves the norm before them idle
    with torch.no_grad():
        scores = task.evaluate(model.eval())
        assert scores == task.evaluate(model)
    assert task.metric in scores
    assert all(isinstance(v, float) for v in scores.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_entrant_that_exchanges_nothing_lets_tokens_learn_nothing_of_each_other(name):
    """With entrant "none" only the trunk's own parts remain, so cross tasks cannot see their context."""
    task = tasks.get(name)
    if not task.pattern.endswith("cross"):
        pytest.skip("self-attention: tokens see themselves")
    model, example = build(task, "none"), task.example()
    read = {"forecast": "history", "argmax-position": "x"}.get(name, "source")
    if name == "copy":
        pytest.skip("its source is also its target")
    changed = {**example, read: example[read].flip(1)}
    assert torch.equal(task.loss(model, example), task.loss(model, changed))


@pytest.mark.parametrize("name", NAMES)
def test_labels_fit_the_weights(name):
    from crosslight.comparison import maps

    task = tasks.get(name)
    model, example = build(task), task.example()
    assert all(len(t) == 1 for t in example.values())
    (shown,) = maps.seen(task, model, torch.device("cpu"))
    labels = task.labels(example)
    assert shown.shape == (2, len(labels["rows"]), len(labels["columns"]))
    torch.testing.assert_close(shown.sum(-1), torch.ones(shown.shape[:2]))


@pytest.mark.parametrize("name", ["language", "copy", "spelling"])
def test_causal_models_do_not_see_what_they_predict(name):
    task = tasks.get(name)
    model = build(task).double().eval()
    key = {"language": "tokens", "copy": "source", "spelling": "target"}[name]
    example = task.example()
    if name == "language":
        embedded = model.embed(example[key][:, :-1]).detach().requires_grad_()
        out = model.trunk(embedded)
    else:
        context = torch.randn(1, 5, 16, dtype=torch.double)
        embedded = model.embed(example[key]).detach()[:, :8].requires_grad_()
        out = model.decoder(model.before(embedded), context)
    (grad,) = torch.autograd.grad((out[0, 3] * torch.randn(16).double()).sum(), embedded)
    assert grad[0, :4].abs().sum(-1).gt(0).all()
    assert not grad[0, 4:].any()


def test_language_holds_out_whole_files():
    from crosslight.tasks import data
    from crosslight.tasks.language import library

    train, test = library()
    held, kept = data.sources(True), data.sources(False)
    assert not set(held) & set(kept)
    assert 0.05 < len(held) / len(held + kept) < 0.2
    assert bytes(test.tolist()) == b"\n".join(p.read_bytes() for p in held)
    assert len(train) > 1_000_000


def test_spelling_pairs_are_functions_and_their_docstrings():
    from crosslight.tasks.spelling import pairs

    train, test = pairs(False), pairs(True)
    assert len(train) > 1000
    assert len(test) > 50
    assert all(name.isidentifier() and doc.strip() for doc, name in test)
    assert ("Convert sys.path into a list of absolute, existing, unique paths.", "pathdirs") in train + test


def test_forecast_is_chronological():
    """No value of the held-out months is in a training window."""
    task = tasks.get("forecast")
    rows, cut = task._split()
    held = task._held_out()
    assert len(held["future"]) == len(rows) - cut - task.horizon + 1
    level = rows[cut - task.history : cut].mean(0)
    torch.testing.assert_close(held["future"][0], rows[cut : cut + task.horizon, 0] - level[0])
    marked = rows.clone()
    marked[cut:] = float("nan")
    starts = torch.arange(cut - task.history - task.horizon + 1)
    assert all(t.isfinite().all() for t in task._windows(marked, starts).values())


def test_digits_give_the_grid():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, context=None, *, grid=None, **_):
            seen.append((grid, x.shape[1]))
            return x

    task = tasks.get("digits")
    model = build(task, "none")
    model.trunk.blocks[0].entrant = Spy()
    task.loss(model, task.example())
    assert seen == [((8, 8), 64)]


def test_bad_names_and_options():
    with pytest.raises(CrosslightError, match="task: got 'digit', expected one of .*digits"):
        tasks.get("digit")
    with pytest.raises(CrosslightError, match=r"task: got '\.\./copy'"):
        tasks.get("../copy")
    with pytest.raises(CrosslightError, match="options of task 'copy': .*'size'.*length, symbols"):
        tasks.get("copy", size=3)
    with pytest.raises(CrosslightError, match="length: got 1"):
        tasks.get("language", length=1)


def test_importing_tasks_loads_no_data_library():
    import subprocess
    import sys

    code = "import sys, crosslight.tasks as t; t.get('digits'); print({'sklearn', 'pandas'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
