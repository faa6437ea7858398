"""Head importance: gates, the gradient identity, pruning."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError
from crosslight.explain.sixteen_heads import HeadGates, head_importance, keep_most_important, prune

DIM, HEADS = 16, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(crosslight.create("softmax", dim=DIM, heads=HEADS) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def net():
    return Net().double()


@pytest.fixture
def x():
    return torch.randn(3, 6, DIM, dtype=torch.double)


def loss(model, batch):
    return (model(batch) ** 2).sum((1, 2))


def gates(*values):
    return {"layers.0": torch.tensor(values[0]), "layers.1": torch.tensor(values[1])}


def test_gates_of_one_reproduce_the_model(net, x):
    with crosslight.steer(net, HeadGates(gates([1.0] * 4, [1.0] * 4))):
        assert torch.allclose(net(x), (before := net(x)), atol=0)
    assert torch.allclose(net(x), before, atol=1e-12)


def test_a_gate_of_zero_is_a_zeroed_slice_of_the_output_projection(net, x):
    with crosslight.steer(net, HeadGates(gates([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]))):
        gated = net(x)
    d = DIM // HEADS
    with torch.no_grad():
        net.layers[0].out.weight[:, d : 2 * d] = 0
        net.layers[1].out.weight[:, :d] = 0
        net.layers[1].out.weight[:, 3 * d :] = 0
    assert torch.allclose(net(x), gated, atol=1e-12)


def test_scores_are_the_inner_product_of_head_output_and_its_gradient(net, x):
    outputs = []

    def keep(core, args, output):
        output.retain_grad()
        outputs.append(output)

    hooks = [layer.core.register_forward_hook(keep) for layer in net.layers]
    loss(net, x).sum().backward()
    for hook in hooks:
        hook.remove()
    reading = head_importance(net, [x[:2], x[2:]], loss, normalise=False)
    for i, out in enumerate(outputs):
        expected = (out * out.grad).sum((2, 3)).abs().mean(0)
        assert torch.allclose(reading.scores[f"layers.{i}"].double(), expected, rtol=1e-6)


def test_scores_have_norm_one_in_each_layer_and_leave_gradients_alone(net, x):
    reading = head_importance(net, [x], loss)
    for scores in reading.scores.values():
        assert torch.allclose(scores.norm(), torch.ones(()).to(scores), atol=1e-6)
    assert all(p.grad is None for p in net.parameters())


def test_pruning_equals_gating_and_removes_the_weights(net, x):
    reading = head_importance(net, [x], loss)
    chosen = keep_most_important(reading, 0.5)
    assert sum(g.sum() for g in chosen.values()) == HEADS
    with crosslight.steer(net, HeadGates(chosen)):
        gated = net(x)
    before = sum(p.numel() for p in net.parameters() if p.dim() == 2)
    prune(net, chosen)
    assert torch.allclose(net(x), gated, atol=1e-12)
    d = DIM // HEADS
    assert before - sum(p.numel() for p in net.parameters() if p.dim() == 2) == HEADS * 4 * DIM * d
    assert net(x).requires_grad


def test_importance_works_in_a_host_of_transformers():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model = BertModel(config).eval()
    ids = torch.arange(6).view(2, 3)
    reading = head_importance(model, [ids], lambda m, b: m(b).last_hidden_state.square().sum((1, 2)))
    assert len(reading.scores) == 2
    assert all(s.shape == (2,) and (s > 0).all() for s in reading.scores.values())


def test_bad_input_names_the_argument(net, x):
    with pytest.raises(CrosslightError, match="batches: got none"):
        head_importance(net, [], loss)
    with pytest.raises(CrosslightError, match="gates: got 'nowhere'"):
        prune(net, {"nowhere": torch.ones(4)})
    with pytest.raises(CrosslightError, match="no head kept"):
        prune(net, {"layers.0": torch.zeros(4)})
    with pytest.raises(CrosslightError, match="share: got 2"):
        keep_most_important(head_importance(net, [x], loss), 2)


def test_reading_plots(net, x):
    pytest.importorskip("plotly")
    figure = head_importance(net, [x], loss).plot()
    assert len(figure.data) == 2
    assert len(figure.data[0].y) == HEADS
