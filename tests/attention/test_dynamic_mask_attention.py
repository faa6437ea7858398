"""Dynamic mask attention: parity with Doge, and the choice of keys sorted out by hand."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention import dynamic_mask_attention as module
from crosslight.errors import CrosslightError


def layer(window=6, seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": 32, "heads": 4, "kv_heads": 2, "position": None, **options}
    attn = crosslight.create("dynamic-mask-attention", window=window, **options).double()
    with torch.no_grad():
        attn.A.normal_()
    return attn


def kept_by_hand(attn, x, n):
    """For each batch entry, head and query: the past keys, sorted by importance, later ones first among equals."""
    importance = attn.importance(attn._values(x))
    keep = torch.zeros(x.shape[0], attn.heads, n, n, dtype=torch.bool)
    for b in range(x.shape[0]):
        for h in range(attn.heads):
            m = importance[b, h // (attn.heads // attn.kv_heads)].tolist()
            for i in range(n):
                order = sorted(range(i + 1), key=lambda j: (m[j], j), reverse=True)
                keep[b, h, i, order[: attn.window]] = True
    return keep


@pytest.mark.parametrize("chunk", [1, 5, 128])
@pytest.mark.parametrize(("n", "window"), [(40, 6), (37, 1), (11, 30), (50, 17)])
def test_reads_the_w_most_important_keys_of_the_past(monkeypatch, chunk, n, window):
    monkeypatch.setattr(module, "CHUNK", chunk)
    attn = layer(window)
    x = torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True)
    keep = kept_by_hand(attn, x, n)
    assert torch.equal(attn.weights(x, causal=True) > 0, keep)
    q, k, v = attn._queries(x), attn._keys(x), attn._values(x)
    k, v, m = (t.repeat_interleave(2, 1) for t in (k, v, attn.importance(v)))
    scores = q @ k.transpose(-1, -2) / 8**0.5 + m[:, :, None]
    expected = attn.out((scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
    y = attn(x, causal=True)
    torch.testing.assert_close(y, expected)
    goal = torch.randn_like(y)
    of = [x, attn.A, attn.dt.weight, attn.k.weight]
    for got, wanted in zip(torch.autograd.grad(y, of, goal), torch.autograd.grad(expected, of, goal), strict=True):
        torch.testing.assert_close(got, wanted)


def test_number_of_keys_and_no_future():
    attn = layer(6)
    weights = attn.weights(torch.randn(2, 40, 32, dtype=torch.float64), causal=True)
    assert torch.equal((weights > 0).sum(-1), torch.arange(1, 41).clamp(max=6).expand(2, 4, 40))
    assert not weights.triu(1).any()


def test_without_importance_it_is_softmax_with_normalised_queries_and_keys():
    attn = layer(64)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        attn.A.zero_()
        attn.q_norm.weight.normal_()

    def heads(t, count):
        return t.view(2, 40, count, 8).transpose(1, 2)

    q = F.rms_norm(heads(attn.q(x), 4), (8,), attn.q_norm.weight, 1e-6)
    k = F.rms_norm(heads(attn.k(x), 2), (8,), attn.k_norm.weight, 1e-6)
    y = F.scaled_dot_product_attention(q, k, heads(attn.v(x), 2), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attn(x, causal=True), attn.out(y.transpose(1, 2).flatten(2)))


def test_it_starts_as_a_sliding_window():
    attn = layer(6)
    with torch.no_grad():
        attn.A.zero_()
    read = attn.weights(torch.randn(1, 20, 32, dtype=torch.float64), causal=True) > 0
    distance = torch.arange(20)[:, None] - torch.arange(20)
    assert torch.equal(read, ((distance >= 0) & (distance < 6)).expand_as(read))


def test_the_mask_is_trained():
    """A has a gradient from the start, W_dt once A has left zero."""
    attn = layer(6)
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    for start, trained in ((0.0, False), (0.5, True)):
        with torch.no_grad():
            attn.A.fill_(start)
        a, dt = torch.autograd.grad(attn(x, causal=True).square().sum(), (attn.A, attn.dt.weight))
        assert a.all()
        assert bool(dt.any()) is trained


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [7, 64])
def test_equals_doge(kv_heads, window):
    pytest.importorskip("transformers")
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeAttention, DogeRotaryEmbedding

    config = DogeConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        keep_window_size=window,
        attention_dropout=0.0,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    theirs = DogeAttention(config, 0).eval()
    with torch.no_grad():
        theirs.A.normal_()
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.weight.normal_(1.0, 0.3)
    own = crosslight.create("dynamic-mask-attention", dim=32, heads=4, kv_heads=kv_heads, window=window)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "dt_proj": "dt"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        head, _, rest = name.partition(".")
        state[names.get(head, head) + ("." + rest if rest else "")] = tensor
    own.load_state_dict(state)
    x = torch.randn(2, 30, 32)
    positions = DogeRotaryEmbedding(config)(x, torch.arange(30)[None])
    causal = torch.zeros(30, 30).masked_fill(~torch.ones(30, 30, dtype=torch.bool).tril(), torch.finfo().min)
    with torch.no_grad():
        expected, weights = theirs(x, positions, causal[None, None])
        torch.testing.assert_close(own(x, causal=True), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.weights(x, causal=True), weights, atol=1e-5, rtol=1e-4)


def test_decoding_keeps_w_keys():
    attn = layer(6, position="rope")
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    expected, cache = attn(x, causal=True), None
    with torch.no_grad():
        for i in range(40):
            y, cache = attn.step(x[:, i : i + 1], cache)
            assert cache.state.keys.shape[2] == min(i + 1, 6)
            torch.testing.assert_close(y[:, 0], expected[:, i])
        start, cache = attn.step(x[:, :25])
        rest, _ = attn.step(x[:, 25:], cache)
    torch.testing.assert_close(torch.cat([start, rest], 1), expected)


def test_masked_keys_do_not_take_the_place_of_others():
    attn = layer(6)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    keep = torch.rand(2, 40) < 0.6
    for causal in (False, True):
        read = attn.weights(x, mask=keep, causal=causal) > 0
        seen = keep.cumsum(1) if causal else keep.sum(1, keepdim=True).expand(-1, 40)
        assert torch.equal(read.sum(-1), seen.clamp(max=6)[:, None].expand(-1, 4, -1))
        assert not (read & ~keep[:, None, None]).any()


@pytest.mark.parametrize("chunk", [3, 16])
def test_masked_keys_in_blocks_of_queries_and_heads_in_turns(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module.sparse, "CHUNK", 1)
    attn = layer(6)
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 40) < 0.6
    keep[0, :25] = False  # more than a block of queries with nothing to read
    y, expected = attn(x, causal=True, mask=keep), attn.read(attn.weights(x, causal=True, mask=keep), x)
    torch.testing.assert_close(y, expected)
    of, goal = [x, *attn.parameters()], torch.randn_like(y)
    for got, wanted in zip(*(torch.autograd.grad(out, of, goal) for out in (y, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_without_a_causal_mask_all_queries_read_the_same_keys():
    attn = layer(6)
    x, z = (torch.randn(2, n, 32, dtype=torch.float64) for n in (9, 40))
    read = attn.weights(x, z) > 0
    best = attn.importance(attn._values(z)).topk(6, -1).indices
    expected = torch.zeros(2, 2, 40, dtype=torch.bool).scatter(2, best, True).repeat_interleave(2, 1)
    assert torch.equal(read, expected[:, :, None].expand_as(read))


def test_the_exponent_alone():
    attn = layer(6, exponential=False)
    v = torch.randn(2, 2, 10, 8, dtype=torch.float64)
    both = attn.importance(v)
    attn.exponential = True
    torch.testing.assert_close(attn.importance(v), both.exp())


def test_paper_defaults_and_bad_options():
    attn = crosslight.create("dynamic-mask-attention", dim=32, heads=4)
    assert attn.window == 2048
    assert not attn.A.any()
    with pytest.raises(CrosslightError, match="window"):
        crosslight.create("dynamic-mask-attention", dim=32, heads=4, window=0)
