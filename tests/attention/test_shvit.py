"""Single-head attention: timm's layer and network, the channels that pass by, the start, fusing."""

import copy

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.shvit import SHSA, Network
from crosslight.errors import CrosslightError


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """With batch norms that do something."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, std=0.1)
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
            torch.nn.init.normal_(part.running_mean, std=0.1)
    return module.eval()


def attention_state(state: dict[str, torch.Tensor], qk_dim: int) -> dict[str, torch.Tensor]:
    own = {}
    for name, t in state.items():
        name = name.replace(".c.", ".linear.").replace(".bn.", ".norm.").replace("proj.1", "out").replace("pre_", "")
        t = t.flatten(1) if t.dim() == 4 else t
        if name.startswith("qkv."):
            parts = t.split([qk_dim, qk_dim, len(t) - 2 * qk_dim]) if t.dim() else [t] * 3
            own |= {name.replace("qkv", part): chunk for part, chunk in zip("qkv", parts, strict=True)}
        else:
            own[name] = t
    return own


def layers():
    shvit = pytest.importorskip("timm.models.shvit")
    theirs = stirred(shvit.SHSA(24, qk_dim=4, pdim=6)).double()
    attn = crosslight.create("shvit", dim=24, partial=6, qk_dim=4).double().eval()
    attn.load_state_dict(attention_state(theirs.state_dict(), 4))
    return attn, theirs


def test_equals_timms_layer():
    attn, theirs = layers()
    x = torch.randn(2, 24, 5, 7).double()
    torch.testing.assert_close(attn(x.flatten(2).mT, grid=(5, 7)), theirs(x).flatten(2).mT)


def test_equals_timms_network():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": (16, 28, 40), "depth": (1, 2, 1), "partial_dim": (4, 6, 9)}
    theirs = stirred(timm.create_model("shvit_s1", num_classes=10, **sizes))
    model = Network((16, 28, 40), (1, 2, 1), (0, 6, 9), classes=10).eval()
    model.load_state_dict(renamed(theirs.state_dict()))
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    merge = {"conv1": "0", "conv2": "2", "se": "4.gate", "conv3": "5"}
    own: dict[str, torch.Tensor] = {}
    attention: dict[str, dict[str, torch.Tensor]] = {}
    for name, t in state.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts = ["stages", "0", "0", *parts[1:]]
        elif parts[0] == "head":
            parts = [{"bn": "norm", "l": "head"}[parts[1]], parts[2]]
        elif parts[2] == "downsample":
            inner = parts[4:] if parts[4] != "m" else ["inner", *parts[5:]]
            parts = [*parts[:2], "0", parts[3], merge.get(inner[0], inner[0]), *inner[1:]]
        else:  # stages.i.blocks.j.which.m
            block = [*parts[:2], str(int(parts[3]) + 1)]
            last = "1" if parts[1] == "0" else "2"
            if parts[4] == "mixer":
                attention.setdefault(".".join(block) + ".1.inner.attend.", {})[".".join(parts[6:])] = t
                continue
            parts = [*block, {"conv": "0", "ffn": last}[parts[4]], "inner", *parts[6:]]
        name = ".".join(parts)
        for theirs, ours in {".c.": ".conv.", ".bn.": ".norm.", "pw1": "0", "pw2": "2", "fc1": "0", "fc2": "2"}.items():
            name = name.replace(theirs, ours)
        own[name] = t
    for start, held in attention.items():
        own |= {start + name: t for name, t in attention_state(held, 16).items()}
    return own


def test_channels_that_pass_by_meet_no_attention():
    attn, _ = layers()
    x = torch.randn(1, 10, 24, dtype=torch.double)

    def slope(attn) -> torch.Tensor:
        """Of the output on x2, token by token."""
        passing = x[..., 6:].clone().requires_grad_()
        y = attn(torch.cat([x[..., :6], passing], 2)) * torch.linspace(1, 2, 240).view(10, 24)
        return torch.autograd.grad(y.sum(), passing)[0]

    other = copy.deepcopy(attn)
    for part in (other.q, other.k):
        torch.nn.init.normal_(part.linear.weight)
    assert (other.weights(x) - attn.weights(x)).abs().max() > 0.1
    torch.testing.assert_close(slope(other), slope(attn))
    matrix, zero = attn.out.linear.weight, torch.zeros(10, 6).double()
    by_hand = F.linear(torch.cat([zero, x[0, :, 6:].relu()], 1), matrix)
    rest = F.linear(
        torch.cat(
            [
                (attn.weights(x) @ attn._heads(x, x, crosslight.attention.base.How())[2])[0, 0].relu(),
                torch.zeros(10, 18).double(),
            ],
            1,
        ),
        matrix,
    )
    torch.testing.assert_close(attn(x)[0], attn.out.norm(by_hand + rest))


def test_it_starts_as_nothing():
    attn = crosslight.create("shvit", dim=24)
    assert attn(torch.randn(2, 9, 24)).abs().max() == 0
    assert attn.partial == round(24 / 4.67)


def test_masked_tokens_do_not_enter_the_normalisation():
    attn, _ = layers()
    x, keep = torch.randn(1, 9, 24).double(), torch.arange(9)[None] < 6
    torch.testing.assert_close(attn(x, mask=keep)[:, :6], attn(x[:, :6]))


def test_a_fused_network_is_the_same():
    model = stirred(Network((16, 28, 40), (1, 2, 1), (0, 6, 9), classes=10))
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(copy.deepcopy(model).fuse()(images), expected, atol=1e-5, rtol=1e-5)
    norms = [m for m in model.fuse().modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    assert norms == [model.norm]
    with pytest.raises(CrosslightError, match="training mode"):
        model.train().fuse()


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="partial: got 25"):
        SHSA(24, partial=25)
    with pytest.raises(CrosslightError, match="qk_dim: got 0"):
        SHSA(24, qk_dim=0)
