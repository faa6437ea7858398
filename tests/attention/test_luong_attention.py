"""Luong attention against the paper's formulas, one decoder state at a time."""

import math

import pytest
import torch

import crosslight
from crosslight.engines import dense
from crosslight.errors import CrosslightError

SCORES = ("dot", "general", "concat", "location")
WINDOWS = ("global", "local-m", "local-p")
DIM, N, M = 8, 9, 12


def made(score: str = "general", window: str = "global", **options) -> torch.nn.Module:
    attn = crosslight.create("luong-attention", dim=DIM, score=score, window=window, max_length=20, **options)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attn.double()


def streams(n: int = N, m: int = M, width: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, n, DIM, dtype=torch.float64), torch.randn(2, m, width, dtype=torch.float64)


def by_hand(attn, h, z, t):
    """Weights and attentional state of decoder state h, the t-th, on encoder states z (1 head, no padding)."""
    logits = []
    for s, state in enumerate(z):
        if attn.score == "dot":
            logits.append(h @ state)
        elif attn.score == "general":
            logits.append(h @ attn.w_a[0] @ state)
        elif attn.score == "concat":
            w_a = torch.cat([attn.w_x[0], attn.w_z[0]])
            logits.append(attn.v_a[0, :, 0] @ torch.tanh(torch.cat([h, state]) @ w_a))
        else:
            logits.append((h @ attn.w_a[0])[s])
    centre = None
    if attn.window == "local-m":
        centre = t
    elif attn.window == "local-p":
        centre = len(z) * torch.sigmoid(attn.v_p[0, :, 0] @ torch.tanh(h @ attn.w_p[0]))
    inside = [s for s in range(len(z)) if centre is None or abs(s - centre) <= attn.radius]
    total = sum(math.exp(logits[s]) for s in inside)
    a = [math.exp(logits[s]) / total if s in inside else 0.0 for s in range(len(z))]
    if attn.window == "local-p":
        sigma = attn.radius / 2
        a = [w * math.exp(-((s - centre) ** 2) / (2 * sigma**2)) for s, w in enumerate(a)]
    a = torch.tensor(a, dtype=torch.float64)
    return a, torch.tanh(attn.w_c.weight @ torch.cat([a @ z, h]))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunk", [dense.CHUNK, 1])
def test_equals_the_formulas_written_out(score, window, chunk, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", chunk)
    attn, (x, z) = made(score, window, radius=3), streams()
    with torch.no_grad():
        y, weights = attn(x, z), attn.weights(x, z)
        for b in range(2):
            for t in range(N):
                a, state = by_hand(attn, x[b, t], z[b], t)
                torch.testing.assert_close(weights[b, 0, t], a)
                torch.testing.assert_close(y[b, t], state)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pattern", ["noncausal-self", "causal-self", "noncausal-cross", "causal-cross"])
@pytest.mark.parametrize("heads", [1, 2])
def test_fast_path_equals_weights(score, window, pattern, heads):
    attn, (x, z) = made(score, window, radius=3, heads=heads), streams()
    context, causal = (z if pattern.endswith("cross") else None), pattern.startswith("causal")
    length = M if context is not None else N
    for mask in (None, torch.arange(length) < torch.tensor([[length], [4]])):
        how = {"context": context, "mask": mask, "causal": causal}
        weights = attn.weights(x, **how)
        assert weights.shape == (2, heads, N, length)
        torch.testing.assert_close(attn.read(weights, x, **how), attn(x, **how))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cross", [False, True])
def test_decoding_equals_the_full_pass(score, window, cross):
    attn, (x, z) = made(score, window, radius=3, heads=2), streams()
    context = z if cross else None
    mask = torch.arange(M) < torch.tensor([[M], [4]]) if cross else None
    cache, steps = None, []
    with torch.no_grad():
        for t in range(N):
            first = {"context": context, "mask": mask} if t == 0 else {}
            y, cache = attn.step(x[:, t : t + 1], cache, **first)
            steps.append(y)
        torch.testing.assert_close(torch.cat(steps, 1), attn(x, context, mask=mask, causal=True))


def test_general_with_the_identity_is_dot():
    general, dot, (x, z) = made("general"), made("dot"), streams()
    with torch.no_grad():
        general.w_a.copy_(torch.eye(DIM))
        general.w_c.weight.copy_(dot.w_c.weight)
    torch.testing.assert_close(general(x, z), dot(x, z))


def test_heads_score_their_own_slices():
    two, (x, z) = made("dot", heads=2), streams()
    one = made("dot")
    halves = [one.weights(*(torch.cat([t.chunk(2, -1)[h]] * 2, -1) for t in (x / 2, z))) for h in range(2)]
    torch.testing.assert_close(two.weights(x, z), torch.cat(halves, 1))


@pytest.mark.parametrize("score", SCORES)
def test_a_fixed_window_as_wide_as_the_context_is_global(score):
    wide, whole, (x, z) = made(score, "local-m", radius=M), made(score), streams()
    whole.load_state_dict(wide.state_dict())
    torch.testing.assert_close(wide(x, z), whole(x, z))


@pytest.mark.parametrize("window", ["local-m", "local-p"])
def test_weights_are_zero_outside_the_window_and_clipped_at_the_borders(window):
    attn, (x, z) = made("general", window, radius=2), streams()
    weights = attn.weights(x, z)[:, 0]
    if window == "local-m":
        centre = torch.arange(N).view(1, N, 1)
    else:
        centre = M * attn._aim(attn._split(x))[:, 0]
        assert (centre > 0).all()
        assert (centre < M).all()
    near = (torch.arange(M) - centre).abs() <= 2
    assert torch.equal(weights != 0, near.expand(2, N, M))
    sums = weights.sum(-1)
    if window == "local-m":
        torch.testing.assert_close(sums, torch.ones_like(sums))  # a border window is renormalised over what it has
    else:
        assert (sums < 1).all()


def test_the_predicted_centre_learns_through_the_gaussian():
    attn, (x, z) = made("general", "local-p", radius=3), streams()
    attn(x, z).sin().sum().backward()
    assert (attn.w_p.grad != 0).any()
    assert (attn.v_p.grad != 0).any()


@pytest.mark.parametrize("score", SCORES)
def test_padding_on_the_right_changes_nothing(score):
    """S is the length that is seen, so that the predicted centre does not move with the padding."""
    attn, (x, z) = made(score, "local-p", radius=3), streams()
    padded = torch.cat([z, torch.randn(2, 5, DIM, dtype=torch.float64)], 1)
    torch.testing.assert_close(attn(x, padded, mask=(torch.arange(M + 5) < M).expand(2, -1)), attn(x, z))


@pytest.mark.parametrize("score", ["general", "concat", "location"])
def test_a_context_may_have_its_own_width(score):
    attn, (x, z) = made(score, context_dim=6), streams(width=6)
    assert attn(x, z).shape == x.shape
    assert attn.w_c.weight.shape == (DIM, 6 + DIM)


def test_bad_options_are_refused():
    for options, message in (
        ({"score": "dot", "context_dim": 6}, "context_dim: got 6.*general"),
        ({"score": "cosine"}, "score: got 'cosine'"),
        ({"window": "local"}, "window: got 'local'"),
        ({"radius": 0}, "radius: got 0"),
        ({"heads": 3}, "heads: got 3.*dim"),
    ):
        with pytest.raises(CrosslightError, match=message):
            made(**options)
    with pytest.raises(CrosslightError, match="max_length: got None"):
        crosslight.create("luong-attention", dim=DIM, score="location")
    with pytest.raises(CrosslightError, match=r"context: got 21.*20"):
        made("location")(*streams(m=21))
