"""NiNformer: the gating unit written out, a silent mixer, what depends on what, cost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import crosslight
from crosslight.errors import CrosslightError
from crosslight.testing import flops

DIM, N = 6, 5


def make(**options):
    attn = crosslight.create("ninformer", **{"dim": DIM, "max_length": N, "token_hidden": 7, **options}).double()
    for norm in (attn.token_norm, attn.channel_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return attn


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_unit_is_the_released_one(x):
    """Modules in the arrangement of the released code, with our weights."""
    ours = make(channel_hidden=4)
    token_mix = nn.Sequential(
        nn.LayerNorm(DIM), Transpose(), nn.Linear(N, 7), nn.GELU(), nn.Linear(7, N), Transpose()
    ).double()
    channel_mix = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4), nn.GELU(), nn.Linear(4, DIM)).double()
    token_mix[0].load_state_dict(ours.token_norm.state_dict())
    token_mix[2].load_state_dict(ours.token_in.state_dict())
    token_mix[4].load_state_dict(ours.token_out.state_dict())
    channel_mix[0].load_state_dict(ours.channel_norm.state_dict())
    channel_mix[1].load_state_dict(ours.channel_mix[0].state_dict())
    channel_mix[3].load_state_dict(ours.channel_mix[2].state_dict())
    v = x + token_mix(x)
    v = v + channel_mix(v)
    expected = F.linear(x, ours.proj.weight, ours.proj.bias) * v
    assert torch.allclose(ours(x), expected, atol=1e-12)


def test_parameters_are_the_released_ones():
    count = sum(p.numel() for p in make(channel_hidden=4).parameters())
    mixer = 2 * 2 * DIM + (N * 7 + 7) + (7 * N + N) + (DIM * 4 + 4) + (4 * DIM + DIM)
    assert count == mixer + DIM * DIM + DIM


def test_silent_mixer_gates_with_the_token_itself(x):
    attn = make()
    for layer in (attn.token_out, attn.channel_mix[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.equal(attn(x), (x @ attn.proj.weight.T + attn.proj.bias) * x)


def test_shorter_streams_use_the_first_positions(x):
    attn = make(max_length=9)
    short = make()
    state = attn.state_dict()
    state["token_in.weight"] = state["token_in.weight"][:, :N]
    state["token_out.weight"], state["token_out.bias"] = state["token_out.weight"][:N], state["token_out.bias"][:N]
    short.load_state_dict(state)
    assert torch.allclose(attn(x), short(x), atol=1e-12)


def test_channels_meet_in_the_channel_mlp_only(x):
    """Without norm, channel MLP and projection, what is left is the token MLP, which is the same for every channel."""
    attn = make()
    attn.token_norm = nn.Identity()
    for layer in (attn.channel_mix[2], attn.proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.ones_(attn.proj.bias)
    for z in (x[:1], 10 * x[1:]):  # the same entries are 0 whatever is read
        jacobian = torch.autograd.functional.jacobian(attn, z)[0, :, :, 0]  # (token, channel, token, channel)
        for c in range(DIM):
            for d in range(DIM):
                assert bool(jacobian[:, c, :, d].abs().max() > 1e-12) == (c == d)
    assert torch.allclose(attn(x.flip(-1)), attn(x).flip(-1))


def test_position_of_a_token_matters(x):
    order = torch.tensor([3, 0, 4, 1, 2])
    attn = make()
    assert not torch.allclose(attn(x[:, order]), attn(x)[:, order], atol=1e-3)


def test_weights_are_gelu_taken_apart(x):
    attn = make()
    z = attn.token_norm(x)
    h = z.mT @ attn.token_in.weight.T + attn.token_in.bias
    share = F.gelu(h) / h
    for c in range(DIM):
        expected = attn.token_out.weight @ torch.diag(share[1, c]) @ attn.token_in.weight
        assert torch.allclose(attn.weights(x)[1, c], expected, atol=1e-12)


def test_no_matrix_of_tokens_is_built():
    attn = crosslight.create("ninformer", dim=16, max_length=2048)
    work = [flops.measure(lambda n=n: attn(torch.randn(1, n, 16))) for n in (512, 2048)]
    assert flops.growth(work[0].flops, work[1].flops, 4) < 1.1
    assert work[1].largest < 2048**2 / 8


def test_bad_options_are_named():
    for name in ("token_hidden", "channel_hidden", "max_length"):
        with pytest.raises(CrosslightError, match=f"{name}: got 0"):
            make(**{name: 0})
    with pytest.raises(CrosslightError, match="x: got 6 tokens"):
        make()(torch.randn(1, 6, DIM).double())
