"""Cross-covariance attention: timm's layer and network, its invariances, the causal form against prefixes."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.xcit import XCA, Network
from crosslight.engines import dense
from crosslight.testing import flops


def layer(dim: int = 12, heads: int = 3):
    attn = crosslight.create("xcit", dim=dim, heads=heads).double()
    torch.nn.init.uniform_(attn.core.temperature, 1, 4)
    return attn


def split(name: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """qkv.* of timm as q.*, k.*, v.*."""
    start, _, end = name.rpartition("qkv.")
    return {f"{start}{part}.{end}": chunk for part, chunk in zip("qkv", t.chunk(3), strict=True)}


def test_equals_timms_layer():
    theirs = pytest.importorskip("timm.models.xcit").XCA(12, num_heads=3, qkv_bias=True).double()
    torch.nn.init.uniform_(theirs.temperature, 1, 4)
    attn, x, own = layer(), torch.randn(2, 20, 12).double(), {}
    for name, t in theirs.state_dict().items():
        name = name.replace("proj.", "out.").replace("temperature", "core.temperature")
        own |= split(name, t) if "qkv" in name else {name: t}
    attn.load_state_dict(own)
    torch.testing.assert_close(attn(x), theirs(x))


def test_equals_timms_network():
    timm = pytest.importorskip("timm")
    sizes = {"depth": 2, "num_heads": 4, "embed_dim": 32, "num_classes": 10}
    for patch in (16, 8):
        theirs = timm.create_model("xcit_small_12_p16_224", patch_size=patch, **sizes).eval()
        for name, p in theirs.named_parameters():
            if "gamma" in name or "temperature" in name or "cls_token" in name:
                torch.nn.init.uniform_(p, 0.5, 2)
        model = Network(32, 2, 4, patch=patch, classes=10).eval()
        model.load_state_dict(renamed(theirs.state_dict()))
        images = torch.randn(2, 3, 96, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "cls_token": "cls",
        "pos_embed.token_projection": "positions.project",
        "cls_attn_blocks": "class_blocks",
        "attn.proj": "attend.out",
        "attn.temperature": "attend.core.temperature",
        "attn.": "attend.",
        "local_mp.conv1": "local.0",
        "local_mp.bn": "local.2",
        "local_mp.conv2": "local.3",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    own: dict[str, torch.Tensor] = {}
    gammas: dict[str, dict[str, torch.Tensor]] = {}
    for name, t in state.items():
        if name.startswith("patch_embed.proj."):  # convolution and norm, then an activation
            _, _, place, inner, *rest = name.split(".")
            name = ".".join(["stem", str(int(place) // 2 * 3 + int(inner)), *rest])
        if name.startswith("blocks"):  # theirs are used in the order 1, 3, 2
            name = name.replace("norm2", "norm?").replace("norm3", "norm2").replace("norm?", "norm3")
        if "gamma" in name:
            block, _, number = name.rpartition(".gamma")
            gammas.setdefault(block, {})[number] = t
            continue
        for their, ours in names.items():
            if not (their == "cls_attn_blocks" and not name.startswith(their)):
                name = name.replace(their, ours)
        own |= split(name, t) if "qkv" in name else {name: t}
    for block, parts in gammas.items():
        order = "132" if block.startswith("blocks") else "12"
        own[block.replace("cls_attn_blocks", "class_blocks") + ".scale"] = torch.stack([parts[i] for i in order])
    return own


def test_the_channel_matrix_is_blind_to_order_and_the_output_follows_it():
    attn, x, order = layer(), torch.randn(2, 20, 12).double(), torch.randperm(20)

    def channels(x):
        q, k, _ = attn._heads(x, x, crosslight.attention.base.How())
        return attn.core.channels(q, k)

    torch.testing.assert_close(channels(x[:, order]), channels(x))
    assert channels(x).shape == (2, 3, 4, 4), "of channels, whatever the number of tokens"
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order])


def test_the_scale_of_queries_and_keys_is_nothing():
    core = XCA(2, 4).double()
    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.double).unbind()
    for causal in (False, True):
        torch.testing.assert_close(core(7 * q, k / 3, v, causal=causal), core(q, k, v, causal=causal))


def test_weights_are_the_channel_matrix_on_diagonals():
    core = XCA(2, 4).double()
    q, k = torch.randn(2, 1, 2, 5, 4, dtype=torch.double).unbind()
    weights = core.weights(q, k).view(2, 4, 4, 5, 5)
    channels = core.channels(q, k)[0]
    torch.testing.assert_close(weights, channels[..., None, None] * torch.eye(5).double())
    torch.testing.assert_close(weights.sum((2, 4)), torch.ones(2, 4, 5).double())


@pytest.mark.parametrize("chunk", [1 << 24, 200])
def test_causal_output_is_that_of_the_prefix(chunk, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", chunk)
    core = XCA(2, 4).double()
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 11, 4, dtype=torch.double).unbind())
    rows = []
    for i in range(1, 12):
        unit_q, unit_k = (F.normalize(t[:, :, :i], dim=2) for t in (q, k))
        rows.append(v[:, :, i - 1 : i] @ (unit_q.mT @ unit_k).softmax(-1).mT)
    expected, y = torch.cat(rows, 2), core(q, k, v, causal=True)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for own, other in zip(
        torch.autograd.grad((y * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_masked_tokens_do_not_count():
    attn, x = layer(), torch.randn(1, 9, 12).double()
    keep = torch.arange(9)[None] < 6
    y = attn(x, mask=keep)
    torch.testing.assert_close(y[:, :6], attn(x[:, :6]))
    torch.testing.assert_close(y[:, 6:], attn.out.bias.expand(1, 3, 12))


def test_work_grows_with_the_tokens():
    attn = crosslight.create("xcit", dim=16, heads=2)
    work = [flops.measure(lambda n=n: attn(torch.randn(1, n, 16, requires_grad=True))) for n in (256, 4096)]
    assert flops.growth(work[0].flops, work[1].flops, 16) < 1.05
    assert work[1].largest <= 4096 * 16 * 4, "no tensor larger than a few streams"
