"""Multi-token attention: identity kernels, sums written out, shifted maps, nothing from the future."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crosslight
from crosslight.engines import dense
from crosslight.errors import CrosslightError

DIM, HEADS, D = 16, 4, 4


def make(noise=0.3, **options):
    """A layer whose kernels have left the identity."""
    attn = crosslight.create("mta", **{"dim": DIM, "heads": HEADS, "query_kernel": 3, "key_kernel": 5, **options})
    for name in ("kernel", "mixed"):
        if hasattr(attn.core, name):
            p = getattr(attn.core, name)
            p.data += noise * torch.randn_like(p)
    return attn.double()


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def split(layer, x):
    return layer(x).view(*x.shape[:2], HEADS, D).transpose(1, 2)


@pytest.mark.parametrize("conv", ["pre", "post"])
@pytest.mark.parametrize("mixing", ["pre", "post"])
def test_it_starts_as_causal_attention(conv, mixing):
    attn, x = make(noise=0, norm=False, gate=False, conv=conv, mixing=mixing), stream(9)
    q, k, v = (split(layer, x) for layer in (attn.q, attn.k, attn.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attn(x, causal=True), attn.out(y.transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize("conv", ["pre", "post"])
@pytest.mark.parametrize("mixing", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_the_sums_written_out(conv, mixing, causal):
    n, core = 6, (attn := make(conv=conv, mixing=mixing)).core
    x = stream(n, batch=1)
    s = (split(attn.q, x) @ split(attn.k, x).transpose(-1, -2) / D**0.5)[0].tolist()
    # theta_{a,b}: a queries back, b keys back.
    theta = {
        (h, a, b): core.kernel[h, 0, 2 - a, 2 - b].item() for h in range(HEADS) for a in range(3) for b in range(-2, 3)
    }
    seen = [[not causal or j <= i for j in range(n)] for i in range(n)]

    def convolve(maps):
        return [
            [
                [
                    sum(
                        theta[h, a, b] * maps[h][i - a][j - b]
                        for a in range(3)
                        for b in range(-2, 3)
                        if i - a >= 0 and 0 <= j - b < n and seen[i - a][j - b]
                    )
                    for j in range(n)
                ]
                for i in range(n)
            ]
            for h in range(HEADS)
        ]

    def mix(maps):
        w = core.mixed.tolist()
        return [
            [
                [sum(w[h // 2][h % 2][g] * maps[h // 2 * 2 + g][i][j] for g in range(2)) for j in range(n)]
                for i in range(n)
            ]
            for h in range(HEADS)
        ]

    def softmax(maps):
        rows = [
            [[math.exp(t) if seen[i][j] else 0 for j, t in enumerate(row)] for i, row in enumerate(m)] for m in maps
        ]
        return [[[t / sum(row) for t in row] for row in m] for m in rows]

    maps = convolve(s) if conv == "pre" else s
    maps = softmax(mix(maps) if mixing == "pre" else maps)
    if conv == "post":
        maps = [[[t * seen[i][j] for j, t in enumerate(row)] for i, row in enumerate(m)] for m in convolve(maps)]
    maps = mix(maps) if mixing == "post" else maps
    expected = torch.tensor(maps, dtype=torch.double)
    assert torch.allclose(attn.weights(x, causal=causal)[0], expected, atol=1e-10)


def test_norm_and_gate_are_of_each_head():
    attn, x = make(depth=3), stream(7)
    read = attn.weights(x) @ split(attn.v, x)
    normed = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 - (0.8 - 0.6 * math.exp(-0.9)))
    gated = normed * (normed @ attn.gate.weight[0] + attn.gate.bias).sigmoid().unsqueeze(-1)
    assert torch.allclose(attn(x), attn.out(gated.transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize("conv", ["pre", "post"])
def test_nothing_comes_from_the_future_though_kernels_are_centred(conv):
    attn, x = make(conv=conv), stream(10).requires_grad_()
    y = attn(x, causal=True)
    for i in range(10):
        leak = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0][:, i + 1 :]
        assert not leak.any()


@pytest.mark.parametrize(("a", "b"), [(0, 1), (2, 0), (1, -2), (2, 2)])
def test_a_single_one_off_the_centre_shifts_the_scores(a, b):
    attn, x = make(noise=0, mix=1), stream(8, batch=1)
    nn.init.zeros_(attn.core.kernel)
    attn.core.kernel.data[:, 0, 2 - a, 2 - b] = 1
    s = dense.scores(split(attn.q, x), split(attn.k, x))
    shifted = torch.zeros_like(s)
    rows, columns = slice(a, 8), slice(max(b, 0), 8 + min(b, 0))
    shifted[:, :, rows, columns] = s[:, :, : 8 - a, max(-b, 0) : 8 - max(b, 0)]
    assert torch.allclose(attn.weights(x), shifted.softmax(-1), atol=1e-12)


@pytest.mark.parametrize("conv", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_either_side_changes_nothing(conv, causal):
    attn, x = make(conv=conv), stream(6)
    padded = torch.cat([stream(3), x, stream(2)], 1)
    keep = torch.zeros(2, 11, dtype=torch.bool)
    keep[:, 3:9] = True
    y = attn(padded, mask=keep, causal=causal)[:, 3:9]
    assert torch.allclose(y, attn(x, causal=causal), atol=1e-12)


def test_queries_in_chunks_are_all_queries_at_once(monkeypatch):
    attn, x, z = make(), stream(11), stream(7)
    keep = torch.rand(2, 11) < 0.7
    calls = [lambda: attn(x, causal=True), lambda: attn(x), lambda: attn(x, z), lambda: attn(x, mask=keep, causal=True)]
    expected = [call() for call in calls]
    monkeypatch.setattr(dense, "CHUNK", 300)
    for call, y in zip(calls, expected, strict=True):
        assert torch.allclose(call(), y, atol=1e-12)


@pytest.mark.parametrize("options", [{"conv": "post"}, {"mixing": "pre"}, {"query_kernel": 1}, {"position": "rope"}])
def test_decoding_of_the_variants_is_the_full_pass(options):
    attn, x = make(**options), stream(9)
    for context in (None, stream(5)):
        cache, parts = None, []
        for i in range(9):
            y, cache = attn.step(x[:, i : i + 1], cache, context=context if i == 0 else None)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), attn(x, context, causal=True), atol=1e-10)
        assert cache.state.queries.shape[2] == attn.core.query_kernel - 1


def test_a_kernel_of_one_has_no_parameters():
    core = make(query_kernel=1, key_kernel=1, mix=1).core
    assert not list(core.parameters())


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="key_kernel: got 4, expected an odd positive int"):
        make(key_kernel=4)
    with pytest.raises(CrosslightError, match="mix: got 3, expected a divisor of heads = 4"):
        make(mix=3)
    with pytest.raises(CrosslightError, match="conv: got 'both'"):
        make(conv="both")
