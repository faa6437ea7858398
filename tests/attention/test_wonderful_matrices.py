"""Dynamic mask attention against transformers' Doge, and the three parts of the paper against their definitions."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention import dynamic_mask_attention
from crosslight.attention.base import How
from crosslight.attention.wonderful_matrices import CrossDomainMoE, RotarySSD, lifetimes
from crosslight.errors import CrosslightError


def doge(**options):
    pytest.importorskip("transformers")
    from transformers.models.doge import modeling_doge

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = modeling_doge.DogeConfig(**sizes, num_hidden_layers=1, vocab_size=8, **options)
    config._attn_implementation = "eager"
    return modeling_doge, config


def made(**options):
    attn = crosslight.create("wonderful-matrices", dim=32, heads=4, groups=2, **options).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return attn


@pytest.mark.parametrize("window", [64, 7])
def test_equals_doge_attention(window):
    module, config = doge(keep_window_size=window)
    theirs = module.DogeAttention(config, 0).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ours = crosslight.create("wonderful-matrices", dim=32, heads=4, groups=2, keep_window=window).double()
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "dt_proj": "dt", "A": "a"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"{names.get(first, first)}{'.' * bool(rest)}{rest}"] = tensor
    ours.load_state_dict(state)
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    rotary = module.DogeRotaryEmbedding(config)
    causal = torch.full((23, 23), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1).expand(2, 1, 23, 23)
    angles = rotary(x, torch.arange(23)[None])
    expected, weights = theirs(x, angles, causal)
    torch.testing.assert_close(ours(x, causal=True), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weights(x, causal=True), weights.double(), atol=1e-5, rtol=1e-4)


def test_without_a_it_is_plain_causal_attention():
    attn = crosslight.create("wonderful-matrices", dim=32, heads=4).double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    q, k, v = attn._heads(x, x, How(causal=True))
    assert (k[..., -2:].sum(-1) == 1).all()
    assert q.shape[-1] == k.shape[-1] == 16  # filled up with zeros
    assert not k[..., 8:-2].any()
    expected = F.scaled_dot_product_attention(q[..., :8] * 8**0.5, k[..., :8], v, is_causal=True)
    torch.testing.assert_close(attn(x, causal=True), attn.out(expected.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_reads_the_keys_with_the_largest_m(causal, ties, monkeypatch):
    """The set is written out query by query; what is outside has weight exactly 0."""
    monkeypatch.setattr(dynamic_mask_attention, "CHUNK", 1)  # several chunks of as many queries as are kept
    attn, window = made(keep_window=5), 5
    if ties:
        torch.nn.init.zeros_(attn.a)
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    keep = torch.rand(2, 21) < 0.7
    keep[:, 0] = True
    m = attn._heads(x, x, How())[1][..., -2].detach()
    weights = attn.weights(x, causal=causal, mask=keep)
    for b in range(2):
        for h in range(4):
            for i in range(21):
                may = [j for j in range(i + 1 if causal else 21) if keep[b, j]]
                best = sorted(may, key=lambda j: (float(m[b, h // 2, j]), j))[-window:]
                assert (weights[b, h, i] > 0).nonzero().flatten().tolist() == sorted(best)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 21, dtype=torch.float64))
    torch.testing.assert_close(attn(x, causal=causal, mask=keep), attn.read(weights, x))


def test_lifetimes_in_chunks(monkeypatch):
    m = torch.randint(0, 6, (2, 2, 40)).double()
    whole = lifetimes(m, None, 4)
    monkeypatch.setattr("crosslight.attention.wonderful_matrices.CHUNK", 300)
    assert torch.equal(lifetimes(m, None, 4), whole)


def test_decoding_holds_no_more_than_the_window():
    attn = made(keep_window=6)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    for i in range(30):
        y, cache = attn.step(x[:, i : i + 1], cache)
        torch.testing.assert_close(y[:, 0], expected[:, i])
        assert cache.state.k.shape[2] <= 6
    start, cache = attn.step(x[:, :20])
    torch.testing.assert_close(start, expected[:, :20])
    y, cache = attn.step(x[:, 20:21], cache)
    torch.testing.assert_close(y[:, 0], expected[:, 20])
    with pytest.raises(CrosslightError, match="one token"):
        attn.step(x[:, 21:24], cache)


def test_product_keys_find_what_brute_force_finds():
    moe = CrossDomainMoE(12, 16, experts=49, top=9).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    rows, columns = moe.router(x).unflatten(-1, (2, 7)).unbind(-2)
    every = torch.stack([rows[..., e // 7] + columns[..., e % 7] for e in range(49)], -1)
    best = every.sort(-1, descending=True)
    scores, numbers = moe.route(x)
    torch.testing.assert_close(scores, best.values[..., :9])
    assert torch.equal(numbers, best.indices[..., :9])
    for name in ({"experts": 50}, {"top": 0}):
        with pytest.raises(CrosslightError, match=next(iter(name))):
            CrossDomainMoE(12, 16, **({"experts": 49, "top": 9} | name))


def test_experts_equal_doge_for_one_token():
    """For a single token the released split of router scores is the right one."""
    module, config = doge(is_moe=True, num_experts=64, num_experts_per_tok=6)
    theirs = module.DogeCDMoE(config).double()
    ours = CrossDomainMoE(32, 48, experts=64, top=6).double()
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "router_gate": "router"}
    names |= {"down_embed": "read", "up_embed": "write"}
    ours.load_state_dict({f"{names[k.partition('.')[0]]}.weight": t for k, t in theirs.state_dict().items()})
    x = torch.randn(8, 32, dtype=torch.float64)
    expected = torch.cat([theirs(token.view(1, 1, 32))[0].view(1, 32) for token in x])
    torch.testing.assert_close(ours(x), expected)


def test_rotary_ssd_is_the_same_in_three_forms():
    ssd, n = RotarySSD(8), 75
    c, b = torch.randn(2, 2, 3, n, 8, dtype=torch.float64).unbind(0)
    x, g = torch.randn(2, 3, n, 5, dtype=torch.float64), -torch.rand(2, 3, n, dtype=torch.float64)
    y, state, parts = ssd(c, b, x, g), None, []
    torch.testing.assert_close(ssd.weights(c, b, g) @ x, y)
    for i in range(n):
        here = slice(i, i + 1)
        out, state = ssd.step(c[:, :, here], b[:, :, here], x[:, :, here], g[:, :, here], state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), y)
    # By hand: angles written out, complex numbers for the pairs of channels.
    turn = torch.arange(n)[:, None] * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    c, b = (torch.polar(torch.ones_like(turn), turn) * torch.complex(*t.chunk(2, -1)) for t in (c, b))
    total = g.cumsum(-1)
    expected = torch.zeros_like(y)
    for i in range(n):
        fade = (total[..., i : i + 1] - total[..., : i + 1]).exp()
        score = (c[:, :, i : i + 1].conj() * b[:, :, : i + 1]).sum(-1).real * fade
        expected[:, :, i] = (score.unsqueeze(-1) * x[:, :, : i + 1]).sum(2)
    torch.testing.assert_close(y, expected)
