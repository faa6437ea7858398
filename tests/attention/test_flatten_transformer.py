"""FLatten: its features, the explicit matrix, and the convolution written out cell by cell."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.flatten_transformer import FLatten, Network, ReleasedLayer
from crosslight.engines import masks
from crosslight.errors import CrosslightError

DIM, HEADS, D = 12, 3, 4


def make(**options):
    return crosslight.create("flatten-transformer", **{"dim": DIM, "heads": HEADS, **options}).double()


def heads(n, m=None):
    m = n if m is None else m
    return [torch.randn(2, HEADS, length, D, dtype=torch.double) for length in (n, m, m)]


def test_features_keep_their_length_and_sharpen():
    x = torch.randn(50, D, dtype=torch.double)
    x = x[(x > 0).any(-1)]
    y = FLatten(HEADS, D).focus(x)
    assert torch.allclose(y.norm(dim=-1), F.relu(x).norm(dim=-1), atol=1e-5)
    cubed = F.relu(x) ** 3
    assert torch.allclose(F.normalize(y, dim=-1), F.normalize(cubed, dim=-1), atol=1e-5)
    assert (y.amax(-1) >= x.amax(-1) - 1e-5).all()
    assert torch.allclose(FLatten(HEADS, D, power=1).focus(x), F.relu(x), atol=1e-5)


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_factored_is_the_explicit_matrix(power, causal):
    q, k, v = heads(70)
    r, s = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    r, s = (t.norm(dim=-1, keepdim=True) / (t**power).norm(dim=-1, keepdim=True) * t**power for t in (r, s))
    a = r @ s.transpose(-1, -2)
    a = a.tril() if causal else a
    a = a / a.sum(-1, keepdim=True)
    core = FLatten(HEADS, D, power=power)
    assert torch.allclose(core(q, k, v, causal=causal), a @ v, atol=1e-9)
    assert torch.allclose(core.weights(q, k, causal=causal), a, atol=1e-9)


def test_matrix_is_of_distributions_and_of_low_rank():
    q, k, _ = heads(20)
    a = FLatten(HEADS, D).weights(q, k)
    assert (a >= 0).all()
    assert torch.allclose(a.sum(-1), torch.ones((), dtype=a.dtype))
    assert torch.linalg.matrix_rank(a).max() <= D


def test_convolution_raises_the_rank():
    """The convolution of a channel as a matrix over cells, beside the attention matrix of its head."""
    height, width = 4, 5
    attn, x = make(), torch.randn(1, 20, DIM, dtype=torch.double)
    conv = torch.zeros(20, 20, dtype=torch.double)
    for i in range(20):
        for j in range(20):
            down, right = j // width - i // width, j % width - i % width
            if abs(down) <= 2 and abs(right) <= 2:
                conv[i, j] = attn.conv.weight[1, 0, down + 2, right + 2]
    a = attn.weights(x, grid=(height, width))[0, 0]
    assert torch.linalg.matrix_rank(a) <= D < torch.linalg.matrix_rank(a + conv)
    attn.out = torch.nn.Identity()
    channel = attn(x, grid=(height, width))[0, :, 1]
    assert torch.allclose(channel, (a + conv) @ attn.v(x)[0, :, 1] + attn.conv.bias[1], atol=1e-10)


def test_causal_convolution_reads_the_last_tokens():
    attn, x = make(kernel=3), torch.randn(2, 9, DIM, dtype=torch.double)
    plain = make(kernel=0)
    plain.load_state_dict({name: t for name, t in attn.state_dict().items() if not name.startswith("conv")})
    attn.out = plain.out = torch.nn.Identity()
    v = attn.v(x).unflatten(-1, (HEADS, D))
    taps = attn.conv.weight[:, 0, 1]  # (channels, 3)
    for i in (0, 1, 5):
        local = sum(v[:, i - back] * taps[:, 2 - back] for back in range(3) if i >= back) + attn.conv.bias
        y = plain(x, causal=True)[:, i] + local.flatten(1)
        assert torch.allclose(attn(x, causal=True)[:, i], y, atol=1e-12)


def test_padding_shortens_the_stream():
    attn, x = make(), torch.randn(2, 8, DIM, dtype=torch.double)
    keep = torch.arange(8) < torch.tensor([[5], [8]])
    assert torch.allclose(attn(x, mask=keep)[0, :5], attn(x[:1, :5])[0], atol=1e-12)
    a = attn.core.weights(*heads(8)[:2], mask=masks.keys(keep))
    assert not a[0, :, :, 5:].any()


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="power: got 0"):
        make(power=0)
    with pytest.raises(CrosslightError, match="kernel: got 4"):
        make(kernel=4)


def test_the_released_layer_query_by_query():
    """One scale and one power over all heads, positions of keys, and a mean of products that is never zero."""
    layer = ReleasedLayer(DIM, HEADS, places=6, kernel=3).double()
    for p in (layer.scale, layer.places):
        torch.nn.init.normal_(p)
    x = torch.randn(2, 6, DIM, dtype=torch.double)

    def phi(t):
        t = (t.clamp(min=0) + 1e-6) / F.softplus(layer.scale)
        return t**3 * (t.square().sum(-1) / (t**6).sum(-1)).sqrt()[..., None]

    q, k, v = phi(layer.q(x)), phi(layer.k(x) + layer.places), layer.v(x)
    y = torch.zeros_like(x)
    for h in range(HEADS):
        c = slice(h * D, (h + 1) * D)
        for i in range(6):
            w = (q[:, i, None, c] * k[..., c]).sum(-1)
            y[:, i, c] = (w[..., None] * v[..., c]).mean(1) / (w.mean(1) + 1e-6)[:, None]
        y[..., c] += layer.conv(v[..., c].mT.unflatten(2, (2, 3))).flatten(2).mT
    torch.testing.assert_close(layer(x, grid=(2, 3)), layer.out(y))
    a = layer.weights(x, grid=(2, 3))
    torch.testing.assert_close(layer.read(a, x, grid=(2, 3)), layer(x, grid=(2, 3)))


def test_cswin_adds_a_convolution_of_every_channel():
    layer, plain = (ReleasedLayer(DIM, HEADS, places=6, near=near).double() for near in (True, False))
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("near")})
    layer.out = plain.out = torch.nn.Identity()
    x = torch.randn(2, 6, DIM, dtype=torch.double)
    near = layer.near(layer.v(x).mT.unflatten(2, (2, 3))).flatten(2).mT
    torch.testing.assert_close(layer(x, grid=(2, 3)), plain(x, grid=(2, 3)) + near)


def test_linear_stages_read_the_whole_map_and_windows_do_not():
    sizes = {"dims": [8, 16], "depths": [1, 1], "heads": [1, 2], "mlp_ratios": [2, 2], "classes": 10}
    model = Network(design="swin", linear=1, window=2, image=32, **sizes)
    x = torch.randn(1, 64, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(model.stages[0].blocks[0](x, (8, 8))[0, 0].square().sum(), x)
    assert slope.abs().sum(-1).count_nonzero() == 64
    x = torch.randn(1, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(model.stages[1].blocks[0](x, (4, 4))[0, 0].square().sum(), x)
    assert slope.abs().sum(-1).nonzero()[:, 1].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("design", ["pvt", "pvtv2", "swin", "cswin"])
def test_networks_run(design):
    model = Network([8, 16], [1, 2], [1, 2], design=design, mlp_ratios=[2, 2], image=32, classes=10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(CrosslightError, match="images: got"):
        model(torch.randn(2, 3, 64, 64))
    with pytest.raises(CrosslightError, match="linear: got 3"):
        Network([8, 16], [1, 2], [1, 2], mlp_ratios=[2, 2], linear=3)
