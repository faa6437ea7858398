"""Context-aware cross-attention: its limits are plain attention, its rows sum to 1, its windows hold."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.engines import dense
from crosslight.errors import CrosslightError

DIM, HEADS, D = 16, 4, 4


def make(**options):
    return crosslight.create("ccan-nat", **{"dim": DIM, "heads": HEADS, **options}).double()


def plain(attn):
    other = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        other.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        other.out_proj.load_state_dict(attn.out.state_dict())
    return other


@pytest.fixture
def streams():
    return torch.randn(2, 5, DIM, dtype=torch.double), torch.randn(2, 9, DIM, dtype=torch.double)


@pytest.mark.parametrize("centre", ["peak", "position"])
def test_a_window_of_the_whole_source_is_plain_attention(centre, streams):
    x, z = streams
    attn = make(radius=9, centre=centre)
    y, a = plain(attn)(x, z, z, average_attn_weights=False)
    assert torch.allclose(attn(x, z), y, atol=1e-12)
    assert torch.allclose(attn.weights(x, z), a, atol=1e-12)


def test_a_closed_gate_is_plain_attention_and_an_open_one_only_local(streams):
    x, z = streams
    attn = make(radius=1)
    nn.init.zeros_(attn.core.to_gate.weight)
    nn.init.constant_(attn.core.to_gate.bias, -1e4)
    assert torch.allclose(attn(x, z), plain(attn)(x, z, z)[0], atol=1e-12)
    nn.init.constant_(attn.core.to_gate.bias, 1e4)
    a = attn.weights(x, z)
    assert ((a > 0).sum(-1) <= 3).all()
    assert (a == 0).any()


@pytest.mark.parametrize("centre", ["peak", "position"])
def test_rows_sum_to_one_unless_a_window_is_masked(centre, streams):
    x, z = streams
    attn, keep = make(radius=2, centre=centre), torch.rand(2, 9) < 0.6
    keep[0], keep[:, 4] = False, True
    near = (torch.arange(9) - torch.arange(5)[:, None]).abs() <= 2
    held = (keep[:, None] & near).any(-1)[:, None]
    assert not held.all()
    # Rows whose window holds no visible key have their global share only; a peak is visible.
    g = attn.core.gate(attn.q(x).view(2, 5, HEADS, D).transpose(1, 2)).squeeze(-1)
    expected = torch.where(held, 1.0, 1 - g) if centre == "position" else torch.ones_like(g)
    assert torch.allclose(attn.weights(x, z, mask=keep).sum(-1), expected)
    assert torch.allclose(attn.weights(x, z).sum(-1), torch.ones_like(g))


@pytest.mark.parametrize("centre", ["peak", "position"])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_the_formulas_query_by_query(centre, causal):
    x = torch.randn(1, 8, DIM, dtype=torch.double)
    attn = make(radius=1, centre=centre)
    q, k = (layer(x)[0].view(8, HEADS, D) for layer in (attn.q, attn.k))
    gate = attn.core.to_gate
    found = attn.weights(x, causal=causal)[0]
    for h in range(HEADS):
        for i in range(8):
            visible = range(i + 1 if causal else 8)
            psi = {j: (q[i, h] @ k[j, h]).item() / D**0.5 for j in visible}
            centred = max(psi, key=psi.get) if centre == "peak" else i
            near = [j for j in visible if abs(j - centred) <= 1]
            g = torch.sigmoid(gate.weight[0] @ q[i, h] / D**0.5 + gate.bias[0]).item()
            exp = {j: torch.tensor(s).double().exp().item() for j, s in psi.items()}
            for j in range(8):
                local = exp[j] / sum(exp[c] for c in near) if j in near else 0
                everywhere = exp[j] / sum(exp.values()) if j in psi else 0
                assert found[h, i, j].item() == pytest.approx(g * local + (1 - g) * everywhere, abs=1e-6)


def test_the_local_part_lowers_the_entropy(streams):
    x, z = streams

    def entropy(bias):
        attn = make(radius=1)
        nn.init.zeros_(attn.core.to_gate.weight)
        nn.init.constant_(attn.core.to_gate.bias, bias)
        torch.manual_seed(1)
        for p in (attn.q, attn.k):
            nn.init.normal_(p.weight, std=0.3)
        a = attn.weights(x, z)
        return -(a * a.clamp(min=1e-12).log()).sum(-1).mean()

    assert entropy(3.0) < entropy(0.0) < entropy(-3.0)


def test_queries_in_chunks_are_all_queries_at_once(streams, monkeypatch):
    x, z = streams
    attn = make(radius=1, centre="position")
    expected = [attn(x, z), attn(z, causal=True)]
    monkeypatch.setattr(dense, "CHUNK", 150)
    for mine, y in zip([attn(x, z), attn(z, causal=True)], expected, strict=True):
        assert torch.allclose(mine, y, atol=1e-12)


def test_decoding_keeps_the_windows_of_positions():
    x, z = torch.randn(1, 12, DIM, dtype=torch.double), torch.randn(1, 7, DIM, dtype=torch.double)
    attn = make(radius=1, centre="position")
    for context in (None, z):
        cache, parts = None, []
        for i in range(12):
            y, cache = attn.step(x[:, i : i + 1], cache, context=context if i == 0 else None)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), attn(x, context, causal=True), atol=1e-12)


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="radius: got -1"):
        make(radius=-1)
    with pytest.raises(CrosslightError, match="centre: got 'mean', expected one of peak, position"):
        make(centre="mean")
