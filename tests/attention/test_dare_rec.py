"""DARE: where gradients flow, the search for the best keys, the tied baseline."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crosslight
from crosslight import testing
from crosslight.engines import dense
from crosslight.errors import CrosslightError

DIM, ATT, N, M = 10, 4, 3, 8


def made(**options) -> nn.Module:
    return crosslight.create("dare-rec", **{"dim": DIM, "attention_dim": ATT, **options}).double()


@pytest.fixture
def streams():
    x, z = torch.randn(2, N, DIM, dtype=torch.double), torch.randn(2, M, DIM, dtype=torch.double)
    return x.requires_grad_(), z.requires_grad_()


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("chunk", [dense.CHUNK, 1])
def test_equals_the_equations_written_out(top, chunk, streams, monkeypatch):
    """Two parts, semantic of width 3 and time of width 1, each with its own scale."""
    monkeypatch.setattr(dense, "CHUNK", chunk)
    attn, (x, z) = made(parts=(3, 1), top=top), streams
    x, z = x.detach(), z.detach()
    y, weights = attn(x, z), attn.weights(x, z)
    for b in range(2):
        for i in range(N):
            a, r = x[b, i, :ATT], x[b, i, ATT:]
            s = [float(a[:3] @ k[:3] / math.sqrt(3) + a[3] * k[3]) for k in z[b]]
            best = sorted(range(M), key=lambda j: -s[j])[: top or M]
            total = sum(math.exp(s[j]) for j in best)
            alpha = torch.tensor([math.exp(s[j]) / total if j in best else 0.0 for j in range(M)]).double()
            torch.testing.assert_close(weights[b, 0, i], alpha)
            h = weights[b, 0, i] @ z[b, :, ATT:]
            torch.testing.assert_close(y[b, i], attn.out(torch.cat([h, r * h])))


def test_each_embedding_has_one_role(streams):
    """Weights know nothing of r; with fixed weights, the output knows nothing of a."""
    attn, (x, z) = made(top=5), streams
    for g in torch.autograd.grad(attn.weights(x, z).square().sum(), (x, z)):
        assert g[..., :ATT].any()
        assert not g[..., ATT:].any()
    for g in torch.autograd.grad(attn.read(attn.weights(x, z).detach(), x, z).square().sum(), (x, z)):
        assert not g[..., :ATT].any()
        assert g[..., ATT:].any()


def test_a_search_for_all_keys_is_no_search(streams):
    x, z = streams
    everything, searched = made(), made(top=M)
    searched.load_state_dict(everything.state_dict())
    torch.testing.assert_close(searched(x, z), everything(x, z))


def test_weights_stand_on_the_best_visible_keys(streams):
    attn, (x, _) = made(top=2), streams
    weights = attn.weights(x, causal=True)[:, 0]
    assert torch.equal((weights > 0).sum(-1), torch.tensor([1, 2, 2]).expand(2, -1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, N).double())


def test_equal_embeddings_are_the_tied_baseline():
    """[r ; r] gives what one embedding r in both roles gives: plain attention without projections."""
    decoupled, tied = made(dim=12, attention_dim=6), made(dim=6, attention_dim=None, tied=True)
    r, s = torch.randn(2, N, 6, dtype=torch.double), torch.randn(2, M, 6, dtype=torch.double)
    x, z = torch.cat([r, r], -1), torch.cat([s, s], -1)
    torch.testing.assert_close(decoupled.weights(x, z), tied.weights(r, s))
    h = F.scaled_dot_product_attention(r, s, s)
    torch.testing.assert_close(tied(r, s), tied.out(torch.cat([h, r * h], -1)))
    torch.testing.assert_close(decoupled(x, z), decoupled.out(torch.cat([h, r * h], -1)))


def test_the_tied_baseline_conforms():
    only = ["fast_path_equals_weights", "decoding_equals_full_pass", "gradients_are_exact", "empty_rows_are_zero"]
    testing.check("dare-rec", options={"tied": True, "top": 3}, only=only)


def test_bad_widths_are_named():
    with pytest.raises(CrosslightError, match="attention_dim: got 10, expected a multiple of heads = 1 below 10"):
        made(attention_dim=10)
    with pytest.raises(CrosslightError, match=r"parts: got \(3, 2\), expected widths that sum to 4"):
        made(parts=(3, 2))
