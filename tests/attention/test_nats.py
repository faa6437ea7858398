"""Neural attention search: the rule of the three types, their gradient, and the cache that evicts."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.nats import GLOBAL, LOCAL, SLIDING, Alive
from crosslight.engines import masks, sparse
from crosslight.engines.plans import plan
from crosslight.errors import CrosslightError

TYPES = (GLOBAL, LOCAL, SLIDING)


@pytest.fixture(autouse=True)
def _tiles_at_any_length(monkeypatch):
    """Short calls would be computed densely."""
    monkeypatch.setattr(sparse, "TINY", 0)


def layer(**options):
    torch.manual_seed(1)
    options = {"dim": 24, "heads": 4, "kv_heads": 2, "window": 4, **options}
    return crosslight.create("nats", **options).double().eval()


def tokens(n):
    return torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)


def all_of(attn, kind):
    """Only the tokens' types change: every token is of one kind."""
    attn.types = lambda x, offset=0: torch.full((x.shape[0], attn.kv_heads, x.shape[1]), kind)


def by_hand(kinds, window):
    """Who reads whom, of the types of one head."""
    n = len(kinds)
    read = torch.zeros(n, n, dtype=torch.bool)
    for j, kind in enumerate(kinds):
        end = next((t for t in range(j, n) if kinds[t] == GLOBAL), n)
        for i in range(j, n):
            read[i, j] = kind == GLOBAL or (kind == LOCAL and i <= end) or (kind == SLIDING and i - j < window)
    return read


def read_by_hand(attn, x):
    read = torch.stack([by_hand(kinds, attn.window) for kinds in attn.types(x).flatten(0, 1).tolist()])
    return read.unflatten(0, (x.shape[0], attn.kv_heads)).repeat_interleave(attn.heads // attn.kv_heads, 1)


@pytest.mark.parametrize("n", [1, 9, 40])
def test_rule_of_the_three_types(n):
    attn, x = layer(), tokens(n)
    kinds = attn.types(x)
    assert (kinds[..., 0] == GLOBAL).all()
    if n == 40:
        assert all((kinds == kind).any() for kind in TYPES)
    read = read_by_hand(attn, x)
    assert torch.equal(attn.weights(x, causal=True) > 0, read)
    q, k, v = attn._queries(x), attn._keys(x), attn._values(x)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = attn.out(F.scaled_dot_product_attention(q, k, v, attn_mask=read).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, causal=True), expected)


def test_all_global_and_all_sliding():
    attn, x = layer(), tokens(30)
    softmax = crosslight.create("softmax", dim=24, heads=4, kv_heads=2).double()
    softmax.load_state_dict({name: t for name, t in attn.state_dict().items() if "types" not in name})
    all_of(attn, GLOBAL)
    torch.testing.assert_close(attn(x, causal=True), softmax(x, causal=True))
    all_of(attn, SLIDING)
    torch.testing.assert_close(attn(x, causal=True), softmax(x, mask=masks.window(3), causal=True))


def test_decoding_evicts():
    """The outputs of the full pass, from a cache that holds exactly what is alive."""
    attn, x = layer(position="rope"), tokens(40)
    expected, cache = attn(x, causal=True), None
    alive = read_by_hand(attn, x)[:, ::2].sum(-1)
    with torch.no_grad():
        for i in range(40):
            y, cache = attn.step(x[:, i : i + 1], cache)
            torch.testing.assert_close(y[:, 0], expected[:, i])
            assert torch.equal(cache.state.size, alive[:, :, i])
            if i:
                still = (attn._evicted(cache.state, i + 1).until > i).sum(2).amax()
                assert attn._evicted(cache.state, i + 1).keys.shape[2] == still
        assert cache.state.keys.shape[2] < 40
        start, cache = attn.step(x[:, :17])
        rest, _ = attn.step(x[:, 17:], cache)
    torch.testing.assert_close(torch.cat([start, rest], 1), expected)


def test_gradient_of_types_is_the_papers(monkeypatch):
    """Straight-through draws; dM summed over what each type controls, in loops."""
    attn, x = layer(heads=2, kv_heads=2).train(), tokens(14)
    drawn = F.one_hot(torch.randint(3, (2, 2, 14)), 3).double().requires_grad_()
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, tau, hard: drawn)
    y = attn._search(x, *(p(x) for p in (attn._queries, attn._keys, attn._values)), None)
    goal = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, drawn, goal)
    q, k, v = (p(x).detach() for p in (attn._queries, attn._keys, attn._values))
    scores = (q @ k.transpose(-1, -2) / 12**0.5).masked_fill(~torch.ones(14, 14, dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    expected = torch.zeros_like(drawn)
    for b in range(2):
        for h in range(2):
            kinds = drawn[b, h].argmax(-1).tolist()
            kinds[0] = GLOBAL
            read = by_hand(kinds, attn.window)
            out = scores[b, h].masked_fill(~read, -torch.inf).softmax(-1) @ v[b, h]
            torch.testing.assert_close(y[b, h], out)
            for j in range(1, 14):  # the first type is not chosen
                end = next((t for t in range(j, 14) if kinds[t] == GLOBAL), 14)
                for i in range(j, 14):
                    by = p[b, h, i, j] * (goal[b, h, i] @ (v[b, h, j] - out[i]))
                    expected[b, h, j, GLOBAL] += by * (i > end)
                    expected[b, h, j, LOCAL] += by * (i <= end)
                    expected[b, h, j, SLIDING] += by * (i - j < attn.window)
    torch.testing.assert_close(got, expected)


def test_training_draws_types_and_evaluation_does_not():
    attn, x = layer(), tokens(30)
    assert torch.equal(attn(x, causal=True), attn(x, causal=True))
    attn.train()
    assert not torch.equal(attn(x, causal=True), attn(x, causal=True))
    (by,) = torch.autograd.grad(attn(x, causal=True).square().sum(), attn.to_types.weight)
    assert by.any()


def test_alive_share_is_the_share_of_pairs_and_falls_with_its_gradient():
    attn, x = layer(), tokens(30)
    with torch.no_grad():
        attn.to_types.weight.mul_(1e4)  # the expected type is the type
    read = read_by_hand(attn, x)
    torch.testing.assert_close(attn.alive_share(x), read.sum().double() / (2 * 4 * 30 * 31 / 2))
    attn = layer()
    before = attn.alive_share(x)
    (by,) = torch.autograd.grad(before, attn.to_types.weight)
    with torch.no_grad():
        attn.to_types.weight -= by
    assert attn.alive_share(x) < before


def test_dead_tiles_are_left_out():
    """Sliding tokens need a band of tiles, and a plan never leaves out a pair that is alive."""
    n = 512
    band = Alive((torch.arange(n) + 3).expand(1, 1, n))
    assert plan(band, False, n, n, 32, 32).area <= n * 64
    until = torch.randint(0, n, (2, 2, n))
    some, _ = Alive(until).blocks(
        (
            torch.arange(0, n, 32)[:, None],
            torch.arange(31, n, 32)[:, None],
            torch.arange(0, n, 16),
            torch.arange(15, n, 16),
        )
    )
    dense = Alive(until).dense(2, 2, n, n).any(0).any(0)
    assert not (dense.unflatten(0, (16, 32)).unflatten(2, (32, 16)).any(3).any(1) & ~some).any()


def test_masked_tokens_end_no_life():
    attn, x = layer(), tokens(30)
    keep = torch.rand(2, 30) < 0.6
    read = attn.weights(x, mask=keep, causal=True) > 0
    kinds = attn.types(x)
    for b in range(2):
        kept = keep[b].nonzero().flatten().tolist()
        for h in range(4):
            kind = kinds[b, h // 2]
            for j in kept:
                end = next((t for t in kept if t >= j and kind[t] == GLOBAL), 30)
                last = {GLOBAL: 29, LOCAL: end, SLIDING: j + 3}[int(kind[j])]
                expected = (torch.arange(30) >= j) & (torch.arange(30) <= last)
                assert torch.equal(read[b, h, :, j], expected)


def test_bad_options():
    assert crosslight.create("nats", dim=32, heads=4).temperature == 1.0
    for wrong in ({"window": 0}, {"temperature": 0.0}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            crosslight.create("nats", dim=32, heads=4, **wrong)
