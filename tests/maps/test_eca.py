"""ECA: parity with timm, kernel sizes, the band of its Jacobian."""

import pytest
import torch

import crosslight
from crosslight.errors import CrosslightError
from crosslight.maps.eca import kernel_size


@pytest.mark.parametrize(("channels", "k"), [(64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_the_module_has_k_parameters(channels, k):
    assert kernel_size(channels) == k
    assert sum(p.numel() for p in crosslight.create("eca", channels=channels).parameters()) == k


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_equals_timm(channels):
    layers = pytest.importorskip("timm.layers")
    ours, theirs = crosslight.create("eca", channels=channels), layers.EcaModule(channels)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, channels, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_gate_depends_on_its_neighbours_only():
    gate = crosslight.create("eca", channels=64).double()
    s = torch.randn(1, 64, 1, 1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: gate.weights(t).flatten(), s).view(64, 64)
    distance = (torch.arange(64)[:, None] - torch.arange(64)).abs()
    assert (jacobian[distance <= 1] != 0).all()
    assert (jacobian[distance > 1] == 0).all()


def test_all_channels_share_the_kernel():
    gate = crosslight.create("eca", channels=32, kernel=3)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(gate.weights(x.roll(1, 1))[:, 2:-1], gate.weights(x).roll(1, 1)[:, 2:-1])


def test_the_gate_ignores_where_things_are():
    gate, x = crosslight.create("eca", channels=16), torch.randn(2, 16, 30)
    order = torch.randperm(30)
    torch.testing.assert_close(gate.weights(x[..., order]), gate.weights(x))


def test_an_even_kernel_is_refused():
    with pytest.raises(CrosslightError, match="kernel: got 4"):
        crosslight.create("eca", channels=16, kernel=4)
