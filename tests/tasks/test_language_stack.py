"""Layers that are made together: shared in the model, handed on, and plain where nothing is shared."""

import pytest
import torch

from crosslight import tasks
from crosslight.tasks import Entrant, Size
from crosslight.tasks.language_stack import stacked

SIZE = Size(dim=16, heads=2, depth=4)


@pytest.mark.parametrize("id", ["none", "softmax"])
def test_rows_that_share_nothing_are_those_of_the_language_task(id):
    models = []
    for name in ("language", "language-stack"):
        torch.manual_seed(0)
        models.append(tasks.get(name, length=16).model(Entrant(id), SIZE))
    plain, made = models
    assert made.state_dict().keys() == plain.state_dict().keys()
    made.load_state_dict(plain.state_dict())
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(made(tokens), plain(tokens))


def test_every_second_layer_of_cla_reads_keys_of_the_one_before():
    layers = stacked(Entrant("cla", {"share": 2}), SIZE)
    assert [layer.leads for layer in layers] == [True, False, True, False]
    model = tasks.get("language-stack", length=16).model(Entrant("cla", {"share": 2}), SIZE).double().eval()
    blocks, made = model.trunk.blocks, []
    for block in blocks:
        if block.entrant.leads:
            block.entrant.k.register_forward_hook(lambda *_: made.append(1))
    tokens = torch.randint(256, (2, 16))
    model(tokens).sum().backward()
    assert len(made) == 2  # once a group
    assert all(p.grad is not None for p in model.parameters())


def test_atoms_of_masa_are_the_same_in_all_layers():
    layers = stacked(Entrant("masa", {"atoms": 2}), SIZE)
    assert len(layers) == 4
    assert len({id(layer.q.dictionary) for layer in layers}) == 1
    assert len({id(layer.q.coefficients) for layer in layers}) == 4
    single = sum(p.numel() for p in stacked(Entrant("softmax"), SIZE).parameters())
    assert sum(p.numel() for p in layers.parameters()) < 0.6 * single


@pytest.mark.parametrize("entrant", [Entrant("cla"), Entrant("masa", {"atoms": 2})])
def test_nothing_reads_ahead(entrant):
    model = tasks.get("language-stack", length=16).model(entrant, SIZE).double().eval()
    tokens = torch.randint(256, (2, 16))
    changed = torch.cat([tokens[:, :7], (tokens[:, 7:] + 1) % 256], 1)
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(tokens)[:, 7:], model(changed)[:, 7:])


def test_example_labels_and_loss():
    task = tasks.get("language-stack", length=16)
    model = task.model(Entrant("cla"), SIZE)
    assert task.loss(model, task.example()).isfinite()
    assert len(task.labels(task.example())["rows"]) == 16
