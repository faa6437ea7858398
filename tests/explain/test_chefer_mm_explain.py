"""Chefer relevance: closed form of one stream, the rules written out for two streams and encoder-decoder, limits."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError
from crosslight.explain.chefer_mm_explain import propagate, relevance

DIM = 8


def attention():
    return crosslight.create("softmax", dim=DIM, heads=2)


class OneStream(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(attention() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class TwoStreams(nn.Module):
    """Self-attention of both, then co-attention in both directions from the states before it."""

    def __init__(self):
        super().__init__()
        self.t, self.i, self.ti, self.it = attention(), attention(), attention(), attention()

    def forward(self, t, i):
        t, i = t + self.t(t), i + self.i(i)
        t, i = t + self.ti(t, i), i + self.it(i, t)
        return t, i


def bars(model, inputs, target):
    """Abar of every call, in order, by a plain autograd of our own."""
    with crosslight.watch(model, grad=True) as seen:
        y = target(model(*inputs))
    maps = [m for _, m in seen]
    grads = torch.autograd.grad(y.sum(), maps, allow_unused=True)
    zero = torch.zeros_like
    return [(zero(m) if g is None else (g * m).clamp(min=0)).mean(1).detach() for m, g in zip(maps, grads, strict=True)]


def test_one_stream_is_the_closed_product():
    model, x = OneStream().double(), torch.randn(2, 5, DIM, dtype=torch.double)

    def target(out):
        return out[:, 0].sum(-1)

    product = torch.eye(5, dtype=torch.double)
    for a in bars(model, (x,), target):
        product = (torch.eye(5, dtype=torch.double) + a) @ product
    reading = relevance(model, x, target)
    pair = reading.pairs["input", "input"]
    assert torch.allclose(pair + torch.eye(5), product, atol=1e-12)
    assert torch.allclose(reading.scores["input"], pair[:, 0])
    assert (pair >= 0).all()
    assert pair.abs().sum() > 0


def normalised(r):
    rest = r - torch.eye(r.shape[-1], dtype=r.dtype)
    return torch.nan_to_num(rest / rest.sum(-1, keepdim=True)) + torch.eye(r.shape[-1], dtype=r.dtype)


def test_co_attention_follows_the_rules_written_out():
    model = TwoStreams().double()
    t, i = torch.randn(1, 3, DIM, dtype=torch.double), torch.randn(1, 4, DIM, dtype=torch.double)

    def target(out):
        return out[0][:, 0].sum(-1) + out[1].sum((1, 2))

    a_t, a_i, a_ti, a_it = (a[0] for a in bars(model, (t, i), target))
    tt, ii = torch.eye(3, dtype=torch.double) + a_t, torch.eye(4, dtype=torch.double) + a_i
    # Both directions start from tt and ii; R_ti and R_it are still zero, so A R_it and A R_ti add nothing.
    ti = normalised(tt).T @ a_ti @ normalised(ii)
    it = normalised(ii).T @ a_it @ normalised(tt)
    reading = relevance(model, (t, i), target, stream="stream 0")
    assert torch.allclose(reading.pairs["stream 0", "stream 1"][0], ti, atol=1e-12)
    assert torch.allclose(reading.pairs["stream 1", "stream 0"][0], it, atol=1e-12)
    assert torch.allclose(reading.pairs["stream 0", "stream 0"][0], tt - torch.eye(3), atol=1e-12)
    assert set(reading.scores) == {"stream 0", "stream 1"}


def test_second_co_attention_layer_feeds_back():
    """After a first exchange R_qs is not zero, and the reader's own relevance grows by Abar R_qs."""
    a, b = torch.rand(1, 3, 4), torch.rand(1, 4, 3)
    r = propagate([("t", "i", a), ("i", "t", b), ("t", "i", a), ("i", "t", b)])
    eye3, eye4 = torch.eye(3), torch.eye(4)
    ti, it = eye3.T @ a[0] @ eye4, eye4.T @ b[0] @ eye3
    assert torch.allclose(r["t", "t"][0], a[0] @ it, atol=1e-6)
    assert torch.allclose(r["i", "i"][0], b[0] @ ti, atol=1e-6)


def test_encoder_decoder_of_transformers():
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = BartModel(config).double().eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "decoder_input_ids": torch.tensor([[2, 9, 10]])}

    def target(out):
        return out.last_hidden_state[:, -1].square().sum(-1)

    reading = relevance(model, inputs, target, token=-1)
    with crosslight.watch(model, grad=True) as seen:
        y = target(model(**inputs))
    maps = dict(iter(seen))
    grads = dict(zip(maps, torch.autograd.grad(y.sum(), list(maps.values())), strict=True))
    a = {n: (grads[n] * m).clamp(min=0).mean(1)[0].detach() for n, m in maps.items()}
    encoder, decoder, cross = (
        next(a[n] for n in a if part in n) for part in ("encoder.layers", "decoder.layers.0.self_attn", "encoder_attn")
    )
    ee, dd = torch.eye(4).double() + encoder, torch.eye(3).double() + decoder
    de = normalised(dd).T @ cross @ normalised(ee)
    assert torch.allclose(reading.scores["encoder"][0], de[-1], atol=1e-10)
    assert torch.allclose(reading.scores["decoder"][0], (dd - torch.eye(3))[-1], atol=1e-10)


def test_no_gradient_means_no_relevance():
    model, x = OneStream(), torch.randn(1, 4, DIM)
    reading = relevance(model, x, lambda out: out.sum() * 0)
    assert reading.scores["input"].abs().max() == 0


def test_parameter_gradients_are_left_alone():
    model = OneStream()
    relevance(model, torch.randn(1, 4, DIM), lambda out: out.sum())
    assert all(p.grad is None for p in model.parameters())


def test_streams_of_equal_length_need_names():
    model, t, i = TwoStreams(), torch.randn(1, 4, DIM), torch.randn(1, 4, DIM)
    with pytest.raises(CrosslightError, match="streams: got None"):
        relevance(model, (t, i), lambda out: out[0].sum())
    names = {"t": ("t", "t"), "i": ("i", "i"), "ti": ("t", "i"), "it": ("i", "t")}
    reading = relevance(model, (t, i), lambda out: out[0].sum(), streams=lambda site, *_: names[site.name], stream="t")
    assert set(reading.scores) == {"t", "i"}


def test_bad_input_names_the_argument():
    with pytest.raises(CrosslightError, match="target: got"):
        relevance(OneStream(), torch.randn(1, 3, DIM), None)
    with pytest.raises(CrosslightError, match="stream: got 'x'"):
        relevance(OneStream(), torch.randn(1, 3, DIM), lambda out: out.sum(), stream="x")
    with pytest.raises(CrosslightError, match="no attention that Crosslight knows"):
        relevance(nn.Linear(2, 2), torch.randn(1, 2), lambda out: out.sum())
