"""A restatement of the equations with torch's own modules and the same weights, and the row's exact invariants."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import crosslight
from crosslight.errors import CrosslightError
from crosslight.models.tables.timexer import TimeXer


def tiny(**options) -> TimeXer:
    model = crosslight.create("timexer", preset="tiny", **options).double().eval()
    for p in model.parameters():  # so that norms and biases count
        nn.init.normal_(p, std=0.2)
    return model


def data(model: TimeXer, variates: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    series = 5 + 3 * torch.randn(2, model.seq_len, 1, dtype=torch.float64)
    return series, torch.randn(2, model.lengths[0], variates, dtype=torch.float64)


def multihead(layer, q, kv):
    weights = [layer.q.weight, layer.k.weight, layer.v.weight]
    other = nn.MultiheadAttention(q.shape[-1], layer.heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat(weights))
        other.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
    other.out_proj.load_state_dict(layer.out.state_dict())
    return other(q, kv, kv, need_weights=False)[0]


def restated(model: TimeXer, series, exogenous, channel: int = 0) -> torch.Tensor:
    """The forecast (batch, horizon) of one endogenous series, written from the paper."""

    def normalised(t):
        return F.layer_norm(t.transpose(1, 2), t.shape[1:2], eps=1e-5)  # (batch, variates, time)

    x = normalised(series)[:, channel]
    dim, count = model.head.in_features // 5, 4
    patches = F.linear(torch.stack(x.split(model.patch_len, 1), 1), model.patch.weight)
    for i in range(count):
        for c in range(dim):
            angle = i / 10_000 ** (c // 2 * 2 / dim)
            patches[:, i, c] += math.cos(angle) if c % 2 else math.sin(angle)
    tokens = torch.cat([patches, model.global_token[channel].expand(len(x), 1, dim)], 1)
    variates = F.linear(normalised(exogenous), model.variate[0].weight, model.variate[0].bias)
    for layer in model.layers:
        tokens = layer.norms[0](tokens + multihead(layer.attend, tokens, tokens))
        token = tokens[:, 4:]
        token = layer.norms[1](token + multihead(layer.read, token, variates))
        tokens = torch.cat([tokens[:, :4], token], 1)
        hidden = F.gelu(F.linear(tokens, layer.mlp[0].weight, layer.mlp[0].bias))
        tokens = layer.norms[2](tokens + F.linear(hidden, layer.mlp[3].weight, layer.mlp[3].bias))
    forecast = model.head(model.norm(tokens).flatten(1))
    mean, variance = series[..., channel].mean(1), series[..., channel].var(1, unbiased=False)
    return forecast * (variance + 1e-5).sqrt()[:, None] + mean[:, None]


def test_parity_with_the_equations():
    model = tiny()
    series, exogenous = data(model)
    torch.testing.assert_close(model(series, exogenous)[..., 0], restated(model, series, exogenous))


def test_multivariate_mode_takes_each_channel_in_turn():
    model = tiny(channels=3, exogenous_len=None)
    series = 5 + 3 * torch.randn(2, 48, 3, dtype=torch.float64)
    forecast = model(series)
    assert forecast.shape == (2, 12, 3)
    for channel in range(3):
        torch.testing.assert_close(forecast[..., channel], restated(model, series, series, channel))


def test_any_mechanism_can_be_the_core():
    model = tiny(attention="agent-attention", attention_options={"agents": 4})
    series, exogenous = data(model)
    exogenous.requires_grad_()
    model(series, exogenous).sum().backward()
    assert exogenous.grad.abs().amax((0, 1)).min() > 0


def test_one_layer_lets_exogenous_series_reach_the_global_token_only():
    for depth, reached in ((1, False), (2, True)):
        model = tiny(depth=depth)
        series, exogenous = data(model)
        before, after = model.encode(series, [exogenous]), model.encode(series, [exogenous + 1])
        assert not torch.equal(before[:, -1], after[:, -1])
        assert torch.equal(before[:, :-1], after[:, :-1]) != reached


def test_order_of_the_variates_does_not_matter():
    model = tiny()
    series, exogenous = data(model)
    torch.testing.assert_close(model(series, exogenous.flip(2)), model(series, exogenous))


def test_forecast_moves_and_scales_with_the_series():
    model = tiny()
    series, exogenous = data(model)
    forecast = model(series, exogenous)
    torch.testing.assert_close(model(series + 100, exogenous), forecast + 100)
    # Up to the 1e-5 that keeps the deviation of a constant series from zero.
    torch.testing.assert_close(model(series * 7, exogenous * 3), forecast * 7, rtol=1e-4, atol=1e-4)
    raw = tiny(normalise=False)
    assert not torch.allclose(raw(series + 100, exogenous), raw(series, exogenous) + 100)


def test_exogenous_series_may_have_lengths_of_their_own():
    model = tiny(exogenous_len=(48, 20))
    series, exogenous = data(model)
    other = torch.randn(2, 20, 2, dtype=torch.float64, requires_grad=True)
    model(series, (exogenous, other)).sum().backward()
    assert other.grad.abs().max() > 0


def test_marks_are_variates_that_are_not_normalised():
    model = tiny()
    series, exogenous = data(model)
    marks = torch.rand(2, 48, 2, dtype=torch.float64)
    variates = []
    model.variate[0].register_forward_hook(lambda module, args, out: variates.append(args[0]))
    assert not torch.allclose(model(series, exogenous, marks), model(series, exogenous))
    assert torch.equal(variates[0][:, :3], variates[1])
    assert torch.equal(variates[0][:, 3:], marks.transpose(1, 2))
    torch.testing.assert_close(variates[1].mean(-1), torch.zeros(2, 3, dtype=torch.float64))


def test_without_exogenous_series_there_is_no_cross_attention():
    model = tiny(exogenous_len=None)
    assert all(layer.read is None for layer in model.layers)
    assert model(torch.randn(2, 48, 1, dtype=torch.float64)).shape == (2, 12, 1)


@pytest.mark.parametrize("preset", TimeXer.published)
def test_published_parameter_counts(preset):
    with torch.device("meta"):
        model = crosslight.create("timexer", preset=preset)
    assert sum(p.numel() for p in model.parameters()) == TimeXer.published[preset]


def test_a_step_of_training_lowers_the_loss():
    model = crosslight.create("timexer", preset="tiny", dropout=0.0)
    series, exogenous, target = torch.randn(4, 48, 1), torch.randn(4, 48, 2), torch.randn(4, 12, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        losses.append(F.mse_loss(model(series, exogenous), target))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(2, 40, 1), torch.zeros(2, 48, 1)), r"series: got \(2, 40, 1\), expected \(batch, 48"),
        (lambda m: m(torch.zeros(2, 48, 2), torch.zeros(2, 48, 1)), "series: got 2 channels, expected 1"),
        (lambda m: m(torch.zeros(2, 48, 1)), "exogenous: got 0 tensors, expected 1, one for each exogenous_len"),
        (lambda m: m(torch.zeros(2, 48, 1), torch.zeros(2, 24, 1)), r"exogenous: got \(2, 24, 1\)"),
        (lambda m: m(torch.zeros(2, 48, 1), torch.zeros(3, 48, 1)), "exogenous: got batch 3, expected batch 2"),
        (lambda m: m(torch.zeros(2, 48, 1), torch.zeros(2, 48, 1), torch.zeros(2, 24, 1)), r"marks: got \(2, 24, 1\)"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(CrosslightError, match=message):
        call(crosslight.create("timexer", preset="tiny"))


def test_wrong_options_are_named():
    with pytest.raises(CrosslightError, match="seq_len: got 50, expected a multiple of patch_len = 12"):
        crosslight.create("timexer", preset="tiny", seq_len=50)
    with pytest.raises(CrosslightError, match="options of 'timexer'"):
        crosslight.create("timexer", preset="tiny", patches=4)
