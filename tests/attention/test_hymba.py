"""Hymba: each kind of head alone, the fusion, meta tokens beyond the window, and the network's shared caches."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.hymba import HymbaModel, readers
from crosslight.attention.selective import SelectiveScan
from crosslight.errors import CrosslightError

DIM, HEADS = 8, 2


def make(**options):
    options = {"heads": HEADS, "window": 4, "meta_tokens": 3, "states": 3, **options}
    attn = crosslight.create("hymba", dim=DIM, **options).double()
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return attn


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def rms(y):
    return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def attended(attn, x):
    """The attention heads, query by query, over meta tokens and the window."""
    sinks = attn.sinks
    s = torch.cat([attn.meta.expand(x.shape[0], -1, -1), x], 1) if sinks else x
    q = attn.rope.rotate(attn.q(s).unflatten(-1, (HEADS, -1)).transpose(1, 2))
    k = attn.rope.rotate(attn.k(s).unflatten(-1, (attn.kv_heads, -1)).transpose(1, 2))
    v = attn.v(s).unflatten(-1, (attn.kv_heads, -1)).transpose(1, 2)
    outs = []
    for i in range(sinks, s.shape[1]):
        seen = [j for j in range(i + 1) if j < sinks or j > i - (attn.window or len(s[0]))]
        heads = []
        for h in range(HEADS):
            g = h * attn.kv_heads // HEADS
            scores = torch.einsum("bc,bjc->bj", q[:, h, i], k[:, g, seen]) / (DIM // HEADS) ** 0.5
            heads.append(torch.einsum("bj,bjc->bc", scores.softmax(-1), v[:, g, seen]))
        outs.append(torch.cat(heads, -1))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 1, "window": None}, {"meta_tokens": 0}])
def test_attention_heads_alone(options):
    attn, x = make(**options), stream(11)
    torch.nn.init.zeros_(attn.beta[1])
    assert torch.allclose(attn(x, causal=True), attn.out(attn.beta[0] * rms(attended(attn, x))), atol=1e-12)


def test_state_space_heads_alone_are_mambas():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=DIM, state_size=3, num_hidden_layers=1, time_step_rank=1)
    theirs, attn, x = MambaMixer(config, layer_idx=0).double(), make(), stream(11)
    own = {name: p for name, p in theirs.state_dict().items() if "in_proj" not in name and "out_proj" not in name}
    attn.scan.load_state_dict(own)
    with torch.no_grad():
        attn.beta[0] = 0
        attn.xz.weight.copy_(theirs.in_proj.weight)
        theirs.out_proj = torch.nn.Linear(2 * DIM, 2 * DIM, bias=False).double()
        torch.nn.init.eye_(theirs.out_proj.weight)
        s = torch.cat([attn.meta.expand(2, -1, -1), x], 1)
        expected = attn.out(attn.beta[1] * rms(theirs(s)))[:, 3:]
        assert torch.allclose(attn(x, causal=True), expected, atol=1e-5)


def test_norms_inside_the_scan():
    scan, x = SelectiveScan(4, 2, states=3, normed=True).double(), torch.randn(1, 6, 4, dtype=torch.double)
    for p in scan.parameters():
        torch.nn.init.normal_(p, std=0.5)
    v = F.silu(scan.conv1d(F.pad(x, (0, 0, 3, 0)).transpose(1, 2))).transpose(1, 2)[0]
    h, outs = torch.zeros(4, 3, dtype=torch.double), []
    for t in range(6):
        made = scan.x_proj(v[t]).split([2, 3, 3])
        step, B, C = (rms(u) * norm.weight for u, norm in zip(made, scan.norms, strict=True))
        delta = F.softplus(scan.dt_proj(step))[:, None]
        h = torch.exp(-delta * scan.A_log.exp()) * h + delta * B * v[t][:, None]
        outs.append(h @ C + scan.D * v[t])
    assert torch.allclose(scan(x)[0], torch.stack(outs), atol=1e-12)


def test_both_are_added():
    attn, x = make(), stream(9)
    whole, parts = attn(x, causal=True), []
    for other in (0, 1):
        alone = make()
        alone.load_state_dict(attn.state_dict())
        torch.nn.init.zeros_(alone.beta[other])
        parts.append(alone(x, causal=True))
    assert torch.allclose(whole, sum(parts), atol=1e-12)


def test_norms_take_the_scale_out():
    attn, x = make(), stream(9)
    before = attn(x, causal=True)
    with torch.no_grad():
        attn.v.weight.mul_(100)
    # Only the epsilon of the norm tells them apart.
    assert torch.allclose(attn(x, causal=True), before, atol=1e-3, rtol=1e-3)


def test_meta_tokens_stay_visible_and_nothing_else_outside_the_window():
    attn, x = make(), stream(12).requires_grad_()
    weights = attn.weights(x, causal=True)[:, :HEADS]
    assert not weights.tril(-4).any()
    assert (weights.sum(-1) < 1).all()  # the rest is on the meta tokens
    torch.nn.init.zeros_(attn.beta[1])
    y = attn(x, causal=True)[:, -1].sum()
    meta, tokens = torch.autograd.grad(y, (attn.meta, x))
    assert meta.abs().sum(1).all()
    assert not tokens[:, :8].any()


def test_padding_shortens_the_stream():
    attn, x = make(), stream(9)
    keep = torch.arange(9) < torch.tensor([[5], [9]])
    assert torch.allclose(attn(x, causal=True, mask=keep)[0, :5], attn(x[:1, :5], causal=True)[0], atol=1e-12)


def network(**options):
    size = {"vocab": 20, "dim": DIM, "depth": 8, "heads": HEADS, "kv_heads": 1, "hidden": 12, "window": 4}
    return HymbaModel(**{**size, "meta_tokens": 3, "states": 3, **options}).double()


def test_network_decodes_from_shared_caches():
    model, tokens = network(), torch.randint(20, (2, 15))
    full, caches, parts = model(tokens), None, []
    for t in range(15):
        y, caches = model.step(tokens[:, t : t + 1], caches)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-10)
    held = {cache.kv[0].data_ptr(): cache.kv for cache in caches}
    # Full attention in layers 0, 3, 7; layers 1 and 2 share, and 4, 5, 6: keys of 4 and values of 8 a token.
    assert len(held) == 5
    elements = sum(t.numel() for kv in held.values() for t in kv)
    assert elements == 2 * (4 + 8) * (3 * (3 + 15) + 2 * (3 + 4))


def test_groups_of_the_published_model():
    reads = readers(32, (0, 15, 31), 2)
    groups = [i for i, other in enumerate(reads) if not other and 0 < i < 31 and i != 15]
    assert groups == [1, 3, 5, 7, 9, 11, 13, 16, 19, 21, 23, 25, 27, 29]
    assert not any(readers(5, (0, 2, 4), 1))


def test_network_learns_everything():
    model = crosslight.create("hymba", preset="tiny")
    tokens = torch.randint(256, (2, 40))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bad_options_are_named():
    for options, named in (
        ({"window": 0}, "window"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"meta_tokens": -1}, "meta_tokens"),
    ):
        with pytest.raises(CrosslightError, match=f"{named}: got"):
            make(**options)
    with pytest.raises(CrosslightError, match="kv: got"):
        make(own_kv=False)(stream(3), causal=True)


def test_recomputed_in_parts_is_the_same(monkeypatch):
    torch.manual_seed(0)
    attn = crosslight.create("hymba", dim=DIM, heads=HEADS, window=4, meta_tokens=3, states=3).double()
    x = torch.randn(2, 9, DIM, dtype=torch.double, requires_grad=True)
    wanted = [x, *attn.parameters()]
    whole = attn(x, causal=True)
    expected = torch.autograd.grad(whole.sin().sum(), wanted)
    monkeypatch.setattr("crosslight.attention.hymba.TOKENS", 5)
    monkeypatch.setattr("crosslight.attention.selective.LARGE", 1)
    parts = attn(x, causal=True)
    assert torch.allclose(parts, whole, atol=1e-12)
    for got, want in zip(torch.autograd.grad(parts.sin().sum(), wanted), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-12)
