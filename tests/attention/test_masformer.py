"""Mixed spans: the local layer against its definition, the network against GPT-Neo."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.masformer import Decoder, MixedSpan
from crosslight.engines import sparse
from crosslight.engines.plans import plan
from crosslight.errors import CrosslightError
from crosslight.testing import flops


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def qkv(n, heads=2, dim=8):
    return [torch.randn(1, heads, n, dim, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("n", "b"), [(64, 8), (61, 8), (20, 7), (9, 1)])
def test_local_layer_block_by_block(n, b):
    """Each block of queries on its own block and the previous one, cut out by hand."""
    q, k, v = qkv(n)
    parts = []
    for start in range(0, n, b):
        first, stop = max(0, start - b), min(start + b, n)
        keep = torch.arange(first, stop) <= torch.arange(start, stop)[:, None]
        parts.append(
            F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], keep)
        )
    core = MixedSpan(2, 8, b)
    torch.testing.assert_close(core(q, k, v, causal=True), torch.cat(parts, 2))


def test_span_is_between_b_and_two_b():
    q, k, _ = qkv(64)
    counts = (MixedSpan(2, 8, 8).weights(q, k, causal=True) > 0).sum(-1)[0, 0]
    expected = torch.tensor([i + 1 if i < 8 else 8 + i % 8 + 1 for i in range(64)])
    assert torch.equal(counts, expected)


def test_no_gradient_before_the_previous_block():
    q, k, v = qkv(64)
    y = MixedSpan(2, 8, 8)(q, k, v, causal=True)
    for i in (16, 31, 45):
        by_k, by_v = torch.autograd.grad(y[:, :, i].square().sum(), (k, v), retain_graph=True)
        first = (i // 8 - 1) * 8
        for by in (by_k, by_v):
            assert not by[:, :, :first].any()
            assert by[:, :, first : i + 1].abs().sum(-1).all()
            assert not by[:, :, i + 1 :].any()


@pytest.mark.parametrize("causal", [False, True])
def test_one_block_for_all_is_the_full_layer(causal):
    q, k, v = qkv(30)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(MixedSpan(2, 8, 30)(q, k, v, causal=causal), expected)
    torch.testing.assert_close(MixedSpan(2, 8, 4, full=True)(q, k, v, causal=causal), expected)


def test_work_is_that_of_the_spans():
    """l n^2 + (N - l) 2 b n, and no matrix n x n, at n = 2048 and b = 64."""
    n, b = 2048, 64
    core = MixedSpan(2, 8, b)
    assert plan(core.rule(None), True, n, n).area <= 2 * b * n
    q, k, v = qkv(n)
    local = flops.measure(lambda: core(q, k, v, causal=True))
    full = flops.measure(lambda: MixedSpan(2, 8, b, full=True)(q, k, v, causal=True))
    assert local.largest < n * n
    assert local.flops < full.flops * 4 * b / n


def test_decoding_keeps_two_blocks_at_most():
    attn = crosslight.create("masformer", dim=16, heads=2, block=4).double()
    x = torch.randn(2, 27, 16, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    with torch.no_grad():
        for i in range(27):
            y, cache = attn.step(x[:, i : i + 1], cache)
            assert cache.state[0].length <= 8
            torch.testing.assert_close(y[:, 0], expected[:, i])
        start, cache = attn.step(x[:, :18])
        rest, _ = attn.step(x[:, 18:], cache)
    torch.testing.assert_close(torch.cat([start, rest], 1), expected)


def renamed(state, width):
    """GPT-Neo's names as ours. It does not divide scores by sqrt(d), so its queries are larger by that."""
    names = {
        "transformer.wte": "embed",
        "transformer.wpe": "positions",
        "transformer.ln_f": "norm",
        "transformer.h": "layers",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.attention.q_proj": "attend.q",
        "attn.attention.k_proj": "attend.k",
        "attn.attention.v_proj": "attend.v",
        "attn.attention.out_proj": "attend.out",
        "mlp.c_fc": "mlp.0",
        "mlp.c_proj": "mlp.2",
    }
    own = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" or name.endswith(("attention.bias", "masked_bias")):
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        own[name] = tensor * width**0.5 if ".attend.q." in name else tensor
    return own


def gpt_neo(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoConfig(**options)
    return transformers.GPTNeoForCausalLM(config)


def test_all_layers_full_is_gpt_neo():
    model = gpt_neo(
        vocab_size=50,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        max_position_embeddings=40,
        attention_types=[[["global"], 3]],
        attention_dropout=0.0,
        resid_dropout=0.0,
        embed_dropout=0.0,
    ).eval()
    own = Decoder(vocab=50, length=40, dim=32, heads=4, depth=3, full_layers=3, block=4)
    own.load_state_dict(renamed(model.state_dict(), 8))
    tokens = torch.randint(50, (2, 37))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(own(tokens), expected, atol=1e-4, rtol=1e-4)
        local = Decoder(vocab=50, length=40, dim=32, heads=4, depth=3, full_layers=1, block=40)
        local.load_state_dict(own.state_dict())
        torch.testing.assert_close(local(tokens), expected, atol=1e-4, rtol=1e-4)
        narrow = Decoder(vocab=50, length=40, dim=32, heads=4, depth=3, full_layers=1, block=4)
        narrow.load_state_dict(own.state_dict())
        torch.testing.assert_close(narrow(tokens)[:, :8], expected[:, :8], atol=1e-4, rtol=1e-4)
        assert (narrow(tokens)[:, 8:] - expected[:, 8:]).abs().max() > 1e-2


def test_published_size_is_that_of_gpt_neo():
    with torch.device("meta"):
        model = gpt_neo(
            vocab_size=50257, hidden_size=2048, num_layers=24, num_heads=16, attention_types=[[["global", "local"], 12]]
        )
    assert sum(p.numel() for p in model.parameters()) == Decoder.published["1.3b"]


def test_reach_of_local_layers_and_of_one_full_layer():
    """Four local layers of b = 8 carry nothing further than 4 * (2 b - 1); one full layer reaches everything."""
    tokens = torch.randint(16, (1, 96))
    for full, reached in ((0, False), (1, True)):
        model = Decoder(vocab=16, length=96, dim=16, heads=2, depth=4, full_layers=full, block=8)
        x = model.embed(tokens).detach().requires_grad_()
        y = x
        for layer in model.layers:
            y = layer(y)
        (by,) = torch.autograd.grad(y[0, -1].sum(), x)
        assert bool(by[0, : 96 - 4 * 15 - 8].any()) is reached


@pytest.mark.parametrize(
    ("placement", "full"), [("bottom", (0, 1)), ("middle", (2, 3)), ("top", (4, 5)), ("spread", (0, 3))]
)
def test_placements(placement, full):
    model = crosslight.create("masformer", preset="tiny", depth=6, full_layers=2, placement=placement)
    assert tuple(i for i, layer in enumerate(model.layers) if layer.attend.core.full) == full == model.full


def test_paper_defaults_and_bad_options():
    assert crosslight.create("masformer", dim=32, heads=4).core.block == 1024
    with pytest.raises(CrosslightError, match="block"):
        crosslight.create("masformer", dim=32, heads=4, block=0)
    with pytest.raises(CrosslightError, match="placement"):
        Decoder(vocab=4, length=4, dim=4, heads=1, depth=1, full_layers=1, placement="side")
