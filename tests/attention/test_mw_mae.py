"""Multi-window attention: windows written out, the global limit, parameter counts, what a head may see."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.mw_mae import PUBLISHED, spread
from crosslight.errors import CrosslightError
from crosslight.testing import flops

HEADS, D, N = 4, 8, 12
DIM = HEADS * D


def make(windows, **options):
    return crosslight.create("mw-mae", **{"dim": DIM, "heads": HEADS, "windows": windows, **options}).double()


def randomise(attn):
    for table in attn.core.tables.values():
        nn.init.normal_(table)
    return attn


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


@pytest.mark.parametrize("windows", [(0, 0, 0, 0), (N, N, N, N), (0, N, 50, 0)])
def test_global_windows_are_plain_attention(windows, x):
    attn = make(windows)
    for table in attn.core.tables.values():
        nn.init.zeros_(table)
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        plain.out_proj.load_state_dict(attn.out.state_dict())
    assert torch.allclose(attn(x), plain(x, x, x)[0], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [12, 11, 3, 1])
def test_heads_are_windows_written_out(causal, n):
    attn, x = randomise(make((3, 0, 4, 3))), torch.randn(2, n, DIM, dtype=torch.double)
    q, k, v = (p(x).unflatten(-1, (HEADS, D)) for p in (attn.q, attn.k, attn.v))
    y, seen = torch.zeros_like(q), {0: 0, 3: 0, 4: 0}
    for h, w in enumerate(attn.core.windows):
        for start in range(0, n, w or n):
            here = slice(start, min(start + (w or n), n))
            scores = q[:, here, h] @ k[:, here, h].mT / D**0.5
            if w:
                for i in range(scores.shape[1]):
                    for j in range(scores.shape[2]):
                        scores[:, i, j] += attn.core.tables[str(w)][seen[w], i - j + w - 1]
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            y[:, here, h] = scores.softmax(-1) @ v[:, here, h]
        seen[w] += 1
    torch.testing.assert_close(attn(x, causal=causal), attn.out(y.flatten(2)))


def test_a_head_depends_on_its_own_window_only(x):
    windows = (2, 0, 6, 4)
    core = randomise(make(windows)).core
    q, k = torch.randn(2, HEADS, N, D).double(), torch.randn(2, HEADS, N, D).double()
    v = torch.randn(2, HEADS, N, D, dtype=torch.double, requires_grad=True)
    for i in (0, 5, 11):
        (slope,) = torch.autograd.grad(core(q, k, v)[:, :, i].sum(), v)
        read = slope.abs().sum((0, 3)) > 0
        for h, w in enumerate(windows):
            expected = torch.arange(N) // w == i // w if w else torch.ones(N, dtype=torch.bool)
            assert torch.equal(read[h], expected)


def test_a_mask_of_pairs_reaches_the_right_heads():
    attn, x = randomise(make((5, 0, 2, 5))), torch.randn(2, 11, DIM, dtype=torch.double)
    mask = torch.rand(2, HEADS, 11, 11) < 0.5
    weights = attn.weights(x, mask=mask)
    assert not weights[~mask].any()
    torch.testing.assert_close(attn.read(weights, x), attn(x, mask=mask))


def test_parameters_are_those_of_plain_attention_and_the_tables():
    attn = make((2, 5, 0, 5), bias=False)
    assert sum(p.numel() for p in attn.parameters()) == 4 * DIM**2 + (2 * 2 - 1) + 2 * (2 * 5 - 1)


def test_windowed_heads_alone_are_linear():
    attn = make((2, 5, 16, 5)).float()
    work = [flops.measure(lambda n=n: attn(torch.randn(1, n, DIM))) for n in (512, 2048)]
    assert flops.growth(work[0].flops, work[1].flops, 4) < 1.1
    assert work[1].largest < 2048**2 / 4


def test_windows_default_to_those_of_the_paper():
    assert spread(8) == PUBLISHED
    assert spread(1) == (0,)
    assert spread(2) == (2, 0)
    assert crosslight.create("mw-mae", dim=16, heads=8).core.windows == PUBLISHED


@pytest.mark.parametrize("windows", [(2, 0), (2, 0, -1, 4)])
def test_bad_windows_are_named(windows):
    with pytest.raises(CrosslightError, match="windows: got"):
        make(windows)
