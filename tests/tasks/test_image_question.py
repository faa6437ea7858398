"""Questions about a row of digits: true answers, no way to guess in the held-out ones, one stream."""

import pytest
import torch

from crosslight import tasks
from crosslight.errors import CrosslightError
from crosslight.tasks import Entrant, Size

pytest.importorskip("sklearn")
SMALL = Size(dim=16, heads=2, depth=2)


def read(pictures, held_out):
    """The digits that pictures show, (batch, digits)."""
    from crosslight.tasks.digits import load

    x, y = (t[:360] if held_out else t[360:] for t in load())
    known = {tuple(image.tolist()): int(digit) for image, digit in zip(x, y, strict=True)}
    return [[known[tuple(image.tolist())] for image in row] for row in pictures]


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_true_of_the_pictures(held_out):
    task = tasks.get("image-question", prior=0.5)
    batch = task._draw(200, held_out, torch.Generator().manual_seed(0))
    kinds = set()
    rows = read(batch["image"], held_out)
    for row, (kind, number), y in zip(rows, batch["question"].tolist(), batch["y"].tolist(), strict=True):
        assert len(set(row)) == 4
        kinds.add(kind)
        if kind == 10:
            assert y == row[number]
        elif kind == 11:
            assert row[y] == number
        else:
            assert y == row[row.index(number) + (-1 if kind == 12 else 1)]
    assert kinds == {10, 11, 12, 13}


def share_of_likely(batch):
    return (batch["y"] == (batch["question"][:, 1] + 1) % 10).float().mean().item()


def test_the_prior_holds_in_training_only():
    task = tasks.get("image-question", prior=0.9)
    assert 0.7 < share_of_likely(next(task.batches(0, 1000))) < 0.95
    assert share_of_likely(task._held_out(1000)) == 0
    assert share_of_likely(next(tasks.get("image-question").batches(0, 1000))) == 0


def test_batches_depend_on_the_seed_alone():
    task = tasks.get("image-question")
    first, same, other = (next(task.batches(seed, 8)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["image"], other["image"])


def jacobian(entrant, task):
    """(n, n): whether the first layer's output at a token depends on its input at another."""
    torch.manual_seed(0)
    block = task.model(entrant, SMALL).trunk.blocks[0].double()
    causal = entrant.id in ("softmax", "ee-mllm")
    x = torch.randn(1, 6, 16, dtype=torch.double, requires_grad=True)
    y = block(x, causal=causal)
    return torch.stack([torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) for i in range(6)])


@pytest.mark.parametrize("id", ["softmax", "ee-mllm", "aki-mma", "lacing", "moda"])
def test_which_rows_let_the_image_read_the_question(id):
    task = tasks.get("image-question")
    options = {} if id == "softmax" else {"images": 4}
    reads = jacobian(Entrant(id, options), task) > 1e-9
    assert reads[5].all()  # the answer is read where everything has been seen
    assert not reads[4, 5]
    assert reads[:4, 4:].all() if id == "aki-mma" else not (id != "moda" and reads[:4, 4:].any())


def test_the_model_asks_for_the_causal_form_where_there_is_one():
    task = tasks.get("image-question")
    causal = {
        id: task.model(Entrant(id, options), SMALL).trunk.causal
        for id, options in {"none": {}, "softmax": {}, "ee-mllm": {"images": 4}, "aki-mma": {"images": 4}}.items()
    }
    assert causal == {"none": True, "softmax": True, "ee-mllm": True, "aki-mma": False}


def test_loss_reaches_every_parameter_and_the_metric_is_there():
    task = tasks.get("image-question")
    model = task.model(Entrant("softmax"), SMALL)
    task.loss(model, next(task.batches(0, 8))).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert 0 <= task.evaluate(model.eval())["accuracy"] <= 1


def test_labels_fit_the_stream():
    task = tasks.get("image-question")
    labels = task.labels(task.example())
    assert len(labels["rows"]) == len(labels["columns"]) == 6


@pytest.mark.parametrize(("options", "named"), [({"digits": 10}, "digits"), ({"prior": 2}, "prior")])
def test_bad_options_are_named(options, named):
    with pytest.raises(CrosslightError, match=named):
        tasks.get("image-question", **options)
