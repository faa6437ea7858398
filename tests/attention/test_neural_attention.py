"""Neural attention: the concatenated form, additive attention, XOR, chunks of queries."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.neural_attention import NeuralAttention
from crosslight.engines import dense
from crosslight.errors import CrosslightError

D, P, N, M = 6, 8, 5, 7


def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 2, N, D, dtype=torch.double, requires_grad=True)
    k, v = torch.randn(2, 2, 2, M, D, dtype=torch.double).unbind()
    return q, k, v


def core(**options) -> NeuralAttention:
    return NeuralAttention(2, D, **{"width": P, **options}).double()


def test_equals_the_concatenated_form():
    """Every pair of reduced query and key side by side, through the three layers."""
    attn, (q, k, v) = core(), heads()
    wide_q = attn.reduce_q(q).unsqueeze(3).expand(-1, -1, -1, M, -1)
    wide_k = attn.reduce_k(k).unsqueeze(2).expand(-1, -1, N, -1, -1)
    layers = nn.Sequential(attn.first, nn.ReLU(), attn.second, nn.ReLU(), attn.last)
    weights = layers(torch.cat([wide_q, wide_k], -1)).squeeze(-1).softmax(-1)
    torch.testing.assert_close(attn.weights(q, k), weights)
    torch.testing.assert_close(attn(q, k, v), weights @ v)
    assert [layer.out_features for layer in (attn.reduce_q, attn.first, attn.second, attn.last)] == [P, P, P // 2, 1]


def test_one_layer_of_tanh_is_additive_attention():
    attn, (q, k, v) = core(width=D, layers=1, activation="tanh"), heads()
    with torch.no_grad():
        for reduce in (attn.reduce_q, attn.reduce_k):
            reduce.weight.copy_(torch.eye(D))
            reduce.bias.zero_()
    w, u = attn.first.weight[:, :D], attn.first.weight[:, D:]
    s = torch.stack(
        [
            torch.stack(
                [
                    (q[:, :, i] @ w.T + k[:, :, j] @ u.T + attn.first.bias).tanh() @ attn.last.weight[0]
                    for j in range(M)
                ],
                -1,
            )
            for i in range(N)
        ],
        2,
    )
    torch.testing.assert_close(attn(q, k, v), s.softmax(-1) @ v)


@pytest.mark.parametrize("biased", [False, True])
def test_chunks_of_queries_change_nothing(biased, monkeypatch):
    attn, (q, k, v) = core(), heads()
    bias = torch.randn(1, 2, N, M, dtype=torch.double) if biased else None
    whole = attn(q, k, v, causal=True, bias=bias)
    slope = torch.autograd.grad(whole.square().sum(), q)[0]
    monkeypatch.setattr(dense, "CHUNK", 1)
    parts = attn(q, k, v, causal=True, bias=bias)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), q)[0], slope)


def test_weights_are_causal_and_sum_to_one():
    attn, (_, k, _) = core(), heads()
    weights = attn.weights(k, k, causal=True)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, M).double())


def test_scores_the_xor_of_query_and_key():
    """s = relu(q + k) - 2 relu(q + k - 1) on bits: each query reads the other bit. q k gives query 0 no preference."""
    attn = NeuralAttention(1, 1, width=2, layers=1).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.zero_()
        attn.reduce_q.weight[0] = attn.reduce_k.weight[0] = 1.0
        attn.first.weight[:, 0] = attn.first.weight[:, 2] = 1.0
        attn.first.bias.copy_(torch.tensor([0.0, -1.0]))
        attn.last.weight.copy_(60 * torch.tensor([[1.0, -2.0]]))
    bits = torch.tensor([0.0, 1.0]).double().view(1, 1, 2, 1)
    torch.testing.assert_close(attn.weights(bits, bits)[0, 0], torch.eye(2).double().flip(0))
    assert (dense.weights(bits, bits, scale=60.0)[0, 0, 0] == 0.5).all()


def test_positions_may_be_added_to_the_scores():
    attn = crosslight.create("neural-attention", dim=8, heads=2, width=P, position="alibi").double()
    x = torch.randn(2, N, 8, dtype=torch.double)
    cache, parts = None, []
    for i in range(N):
        y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True))


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="layers: got 3, expected 1 or 2"):
        core(layers=3)
