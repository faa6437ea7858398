"""CHELA: the kernel and the convolutions tap by tap, the masked product, tiles, and the merged kernel."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention import chela
from crosslight.attention.chela import ShortLong
from crosslight.engines import linear
from crosslight.engines.backend import backend
from crosslight.errors import CrosslightError

DIM = 6


def make(**options):
    options = {"z_dim": 4, "v_dim": 8, "taps": 2, "scales": 3, **options}
    attn = crosslight.create("chela", dim=DIM, **options).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for norm in (m for m in attn.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return attn.eval()


def stream(n, batch=2, width=DIM):
    return torch.randn(batch, n, width, dtype=torch.double)


def long_tap(conv, side, lag):
    """k_long at one distance: 2 taps a scale; pieces of 2, 2 and 4 tokens, the last by linear interpolation."""
    if lag < 4:
        return conv.long[side, lag // 2, :, lag % 2] * 0.5 ** (lag // 2)
    first, second = conv.long[side, 2].unbind(1)
    share = (0.0, 0.25, 0.75, 1.0)[lag - 4]
    return (first + share * (second - first)) / 4


def convolved(conv, x, causal):
    """Both branches through their batch norms in evaluation, token by token."""
    n, sides = x.shape[1], []
    for norm, taps, tap in (
        (conv.norm_long, 8, lambda side, lag: long_tap(conv, side, lag)),
        (conv.norm_short, 3, lambda side, lag: conv.short[side, :, lag]),
    ):
        y = torch.zeros_like(x)
        for t in range(n):
            for s in range(n):
                if 0 <= t - s < taps:
                    y[:, t] += tap(0, t - s) * x[:, s]
                elif not causal and 0 < s - t <= taps:
                    y[:, t] += tap(1, s - t - 1) * x[:, s]
        sides.append((y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias)
    return F.silu(sum(sides))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_equations(causal, heads):
    attn, x = make(heads=heads), stream(13)
    z = convolved(attn.conv, x, causal)
    s, v = F.silu(attn.z(z)), F.silu(attn.v(x))
    q, k = (attn.a[i] * s + attn.b[i] for i in (0, 1))
    heads_of = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        a = torch.einsum("bic,bjc->bij", q_h, k_h)
        o = (a.tril() if causal else a) @ v_h
        heads_of.append(o / (o.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    u, p = F.silu(attn.gate(z)), torch.sigmoid(attn.update(z))
    h = F.silu(attn.candidate(x) + attn.out(u * torch.cat(heads_of, -1)))
    assert torch.allclose(attn(x, causal=causal), p * h + (1 - p) * x, atol=1e-10)


def test_kernel_of_a_short_call_is_the_start_of_the_long_one():
    conv = make().conv
    for n in range(1, 8):
        assert torch.equal(conv.kernel(0, n), conv.kernel(0, 100)[:, :n])
    assert conv.kernel(0, 100).shape == (DIM, 8)


@pytest.mark.parametrize("past_only", [False, True])
def test_merged_kernel_is_the_branches_of_evaluation(past_only):
    conv, x = make(short=5).conv, stream(11)
    expected = conv(x, None, past_only)
    conv.train()
    for norm in (conv.norm_long, conv.norm_short):
        norm.eval()  # the branches, with the statistics of evaluation
    assert torch.allclose(conv(x, None, past_only), expected, atol=1e-12)


def test_short_kernel_longer_than_the_long_one():
    attn, x = make(taps=1, scales=1, short=5), stream(9)
    cache, parts = None, []
    for t in range(9):
        y, cache = attn.step(x[:, t : t + 1], cache)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), attn(x, causal=True), atol=1e-12)


def test_training_uses_the_statistics_of_the_batch():
    conv, x = ShortLong(DIM, 2, 2, 3).double().train(), stream(50, 4)
    before = conv.norm_long.running_mean.clone()
    y = conv.norm_short(conv._near(x.transpose(1, 2), past_only=True))
    assert torch.allclose(y.mean((0, 2)), torch.zeros(DIM, dtype=torch.double), atol=1e-12)
    conv(x, None, True)
    assert not torch.equal(conv.norm_long.running_mean, before)


@pytest.mark.parametrize("tile", [1, 4, 64])
def test_tiles_of_any_size(tile, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", tile)
    attn, x = make(), stream(23)
    assert torch.allclose(attn(x, causal=True), attn.read(attn.weights(x, causal=True), x, causal=True), atol=1e-10)


def test_decoding_keeps_as_many_tokens_as_the_kernel_reaches():
    attn, x = make(), stream(30)
    cache, parts = None, []
    for t in range(30):
        y, cache = attn.step(x[:, t : t + 1], cache)
        parts.append(y)
        assert cache.recent.shape[1] == min(t + 1, 7)
    assert torch.allclose(torch.cat(parts, 1), attn(x, causal=True), atol=1e-12)


def test_closed_update_gate_passes_the_stream_through():
    attn, x = make(), stream(7)
    torch.nn.init.zeros_(attn.update.weight)
    torch.nn.init.constant_(attn.update.bias, -1000.0)
    assert torch.equal(attn(x), x)


def test_a_stream_as_its_own_context():
    attn, x = make(), stream(7)
    assert torch.allclose(attn(x, x), attn(x), atol=1e-12)


def test_padding_shortens_the_stream():
    attn, x = make(), stream(9)
    keep = torch.arange(9) < torch.tensor([[5], [9]])
    assert torch.allclose(attn(x, mask=keep)[0, :5], attn(x[:1, :5])[0], atol=1e-12)
    assert torch.allclose(attn(x, x, mask=keep)[:1, 5:], attn(x[:1], x[:1, :5])[:, 5:], atol=1e-12)


def test_bad_options_are_named():
    for options, named in (({"heads": 3}, "z_dim"), ({"taps": 0}, "taps"), ({"scales": 0}, "scales")):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)


def test_training_is_the_same_in_blocks_and_tap_by_tap():
    """Long calls convolve block by block, and make again in the backward pass what they do not keep."""
    attn, x = make().train(), stream(150).requires_grad_()
    wanted, found = [x, *attn.parameters()], []
    for name in ("auto", "reference"):
        with backend(name):
            y = attn(x, causal=True)
        found.append([y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)])
    for ours, expected in zip(*found, strict=True):
        assert ours is expected is None or torch.allclose(ours, expected, atol=1e-8)


def test_a_training_step_counts_the_batch_once(monkeypatch):
    monkeypatch.setattr(chela, "ROWS", 4)
    attn = make().train()
    conv = attn.conv
    attn(stream(9), causal=True).sum().backward()
    assert (conv.norm_long.num_batches_tracked, conv.norm_short.num_batches_tracked) == (1, 1)
