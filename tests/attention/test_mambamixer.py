"""MambaMixer: Mamba's own layer along the tokens, the recurrence along channels and grids, and the averages."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention import mambamixer
from crosslight.attention.mambamixer import MambaMixerNetwork
from crosslight.errors import CrosslightError

DIM = 6


def make(**options):
    attn = crosslight.create("mambamixer", dim=DIM, **{"states": 3, **options}).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return attn


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def recur(scan, x):
    """S6 of one sequence (n, channels), token by token."""
    n, taps = x.shape[0], scan.conv1d.kernel_size[0]
    padded, outs = F.pad(x, (0, 0, taps - 1, 0)), []
    h = torch.zeros(x.shape[1], scan.states, dtype=torch.double)
    for t in range(n):
        v = F.silu((padded[t : t + taps] * scan.conv1d.weight[:, 0].T).sum(0) + scan.conv1d.bias)
        p = scan.x_proj(v)
        delta = F.softplus(scan.dt_proj(p[: scan.rank]))
        B, C = p[scan.rank : scan.rank + scan.states], p[scan.rank + scan.states :]
        h = torch.exp(-delta[:, None] * scan.A_log.exp()) * h + delta[:, None] * B * v[:, None]
        outs.append(h @ C + scan.D * v)
    return torch.stack(outs)


def mixed(mixer, x, orders):
    """The mixer of one sequence, of scans in the given orders."""
    inner, z = mixer.in_proj(x).chunk(2, -1)
    y = torch.zeros_like(inner)
    for scan, there in zip(mixer.scans, orders, strict=False):
        y[there] += recur(scan, inner[there])
    return mixer.out_proj(y * F.silu(z))


def channels_of(attn, y):
    both = [list(range(DIM)), list(range(DIM))[::-1]]
    if attn.tokens is not None:
        return mixed(attn.channel.mix, attn.channel.norm(y).T, both).T
    return torch.stack([mixed(attn.channel.mix, attn.channel.norm(row)[:, None], both)[:, 0] for row in y])


@pytest.mark.parametrize("causal", [False, True])
def test_equations(causal):
    attn, x = make(), stream(9, 1)
    line = list(range(9))
    y = mixed(attn.token, x[0], [line] if causal else [line, line[::-1]])
    expected = attn.alpha * y + attn.beta * channels_of(attn, y)
    assert torch.allclose(attn(x, causal=causal)[0], expected, atol=1e-10)


def test_four_directions_of_a_grid_and_the_papers_channel_mixer():
    attn, x = make(directions=4, tokens=12), stream(12, 1)
    rows = list(range(12))
    columns = [4 * i + j for j in range(4) for i in range(3)]
    y = mixed(attn.token, x[0], [rows, rows[::-1], columns, columns[::-1]])
    expected = attn.alpha * y + attn.beta * channels_of(attn, y)
    assert torch.allclose(attn(x, grid=(3, 4))[0], expected, atol=1e-10)
    weights = attn.weights(x, grid=(3, 4))
    assert torch.allclose(attn.read(weights, x, grid=(3, 4))[0], expected, atol=1e-10)


def test_token_mixer_is_mambas():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=DIM, state_size=3, num_hidden_layers=1, time_step_rank=1)
    theirs, attn, x = MambaMixer(config, layer_idx=0).double(), make(channels=False), stream(11)
    own = ("in_proj", "out_proj")
    state = {name if name.startswith(own) else f"scans.0.{name}": p for name, p in theirs.state_dict().items()}
    assert not attn.token.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        ours = attn(x, causal=True) / attn.alpha
        assert torch.allclose(ours, theirs(x), atol=1e-6)


def test_channel_mixer_sees_all_channels_and_one_token():
    attn, x = make(), stream(5, 1).requires_grad_()
    seen = torch.autograd.grad(attn.channel(x)[0, 2, 3], x)[0][0].abs() > 0
    assert seen[2].all()
    assert not seen[[0, 1, 3, 4]].any()


def test_tokens_some_at_a_time(monkeypatch):
    attn, x = make(), stream(5, 1).requires_grad_()
    whole = attn.channel(x)
    expected = torch.autograd.grad(whole.sin().sum(), [x, *attn.channel.parameters()])
    monkeypatch.setattr(mambamixer, "LANES", 18)
    parts = attn.channel(x)
    assert torch.allclose(parts, whole, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(parts.sin().sum(), [x, *attn.channel.parameters()]), expected, strict=True
    ):
        assert torch.allclose(got, want, atol=1e-12)


def test_padding_shortens_the_stream():
    attn, x = make(), stream(9)
    keep = torch.arange(9) < torch.tensor([[5], [9]])
    for causal in (False, True):
        short = attn(x[:1, :5], causal=causal)[0]
        assert torch.allclose(attn(x, causal=causal, mask=keep)[0, :5], short, atol=1e-12)


def test_one_hot_averages_are_a_plain_stack():
    model, x = (
        MambaMixerNetwork(inputs=2, dim=DIM, depth=3, outputs=1, states=3).double(),
        torch.randn(2, 7, 2).double(),
    )
    for i, (to_token, to_channel) in enumerate(zip(model.to_token, model.to_channel, strict=True)):
        for p in (to_token, to_channel):
            torch.nn.init.zeros_(p)
        with torch.no_grad():
            to_token[1, i] = 1  # the channel mixer of the layer before
            to_channel[i + 1] = 1  # the token mixer of this layer
    y = model.embed(x)
    for norm, token, channel in zip(model.norms, model.token, model.channel, strict=True):
        y = channel(token(norm(y)))
    assert torch.allclose(model(x), model.head(model.norm(y)), atol=1e-12)


def test_network_learns_all_averages():
    model = crosslight.create("mambamixer", preset="tiny")
    y = model(torch.randn(2, 6, 1))
    y.sin().sum().backward()
    assert y.shape == (2, 6, 10)
    assert all(p.grad is not None and p.grad.any() for p in (*model.to_token, *model.to_channel))


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="directions: got"):
        make(directions=3)
    with pytest.raises(CrosslightError, match="tokens: got"):
        make(tokens=4)(stream(4), causal=True)
    with pytest.raises(CrosslightError, match="x: got"):
        make(tokens=4)(stream(5))
