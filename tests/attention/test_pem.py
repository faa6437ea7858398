"""Prototype attention against its equations, and what may change the winner."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.base import How
from crosslight.errors import CrosslightError

DIM, GRID = 16, (4, 5)


def made(**options):
    attn = crosslight.create("pem", dim=DIM, **{"heads": 4, "context_grid": GRID} | options).double().eval()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.3 * torch.randn_like(p))
    attn.context_norm.running_mean.normal_()
    attn.context_norm.running_var.uniform_(0.5, 2)
    return attn


def streams(n=6, m=20):
    return torch.randn(2, n, DIM, dtype=torch.float64), torch.randn(2, m, DIM, dtype=torch.float64)


def unit(t):
    return t / (t * t).sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_equations_written_out(masked):
    attn, (x, z) = made(), streams()
    mask = torch.rand(2, 6, 20) < 0.4
    mask[0, 2] = False  # an empty mask is no mask
    bn = attn.context_norm
    pixels = (z - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
    image = F.pad(pixels.mT.view(2, DIM, *GRID), (1, 1, 1, 1))
    around = torch.zeros(2, DIM, *GRID, dtype=torch.float64)
    for dy in range(3):
        for dx in range(3):
            around += attn.around.weight[:, 0, dy, dx, None, None] * image[:, :, dy : dy + 4, dx : dx + 5]
    around = (around + attn.around.bias[:, None, None]).flatten(2).mT
    k, q = unit(attn.k(around)), unit(attn.q(attn.norm(x)))
    p = torch.zeros(2, 6, DIM, dtype=torch.float64)
    for b in range(2):
        for i in range(6):
            for h in range(4):
                here = slice(4 * h, 4 * h + 4)
                may = [j for j in range(20) if not masked or mask[b, i, j] or not mask[b, i].any()]
                p[b, i, here] = k[b, max(may, key=lambda j: (k[b, j, here] @ q[b, i, here]).item()), here]
    product = attn.product(p * q)
    product = product / (product * product).sum(1, keepdim=True).sqrt()
    expected = attn.out(product * attn.alpha + p)
    last = mask.double() - 0.5 if masked else None
    torch.testing.assert_close(attn(x, z, last=last), expected)
    torch.testing.assert_close(attn.read(attn.weights(x, z, last=last), x, z), expected)


def test_losers_and_copies_do_not_matter():
    """Only the winner counts: others may be doubled, or made less alike, and nothing changes."""
    attn, (x, z) = made(kernel=1, context_grid=None), streams()
    y, weights = attn(x, z), attn.weights(x, z)
    assert torch.equal(weights.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(attn(x, torch.cat([z, z[:, 3:9]], 1)), y)
    q = attn._split(attn._queries(x, z))
    k = attn._split(attn._pixels(z, How(cross=True))).detach()
    lost = weights.sum(2) == 0
    smaller = torch.where(lost.unsqueeze(-1), 0.5 * k, k)
    unchanged = (q @ k.mT).amax(-1) > 0
    assert unchanged.any()
    assert torch.equal(attn._winners(q, smaller, How())[unchanged], attn._winners(q, k, How())[unchanged])


def test_negative_mask_logits_and_padding():
    attn, (x, z) = made(), streams()
    logits = torch.randn(2, 6, 20)
    logits[1, 4] = -1.0
    weights = attn.weights(x, z, last=logits)
    assert (weights.masked_select((logits < 0)[:, None].expand_as(weights)).view(-1).sum()) == 4  # the empty one's
    torch.testing.assert_close(weights[1, :, 4], attn.weights(x, z)[1, :, 4])
    keep = torch.rand(2, 20) < 0.5
    both = attn.weights(x, z, mask=keep, last=logits)
    assert (both.sum(2).sum(1)[~keep] == 0).all()
    assert (both.sum(-1) == 1).all()
    nothing = attn.weights(x, z, mask=torch.zeros(2, 20, dtype=torch.bool))
    assert (nothing == 0).all()


def test_pixels_have_no_order_without_the_convolution_and_queries_none_at_all():
    attn, (x, z) = made(kernel=1, context_grid=None), streams()
    y = attn(x, z)
    torch.testing.assert_close(attn(x, z[:, torch.randperm(20)]), y)
    order = torch.randperm(6)
    torch.testing.assert_close(attn(x[:, order], z), y[:, order])
    with_grid = made()
    assert (with_grid(x, z[:, torch.randperm(20)]) - with_grid(x, z)).abs().max() > 1e-3


def test_learned_queries_and_chunks(monkeypatch):
    attn, (_, z) = made(queries=7), streams()
    y = attn(None, z)
    torch.testing.assert_close(attn(attn.queries.expand(2, -1, -1), z), y)
    last = torch.randn(2, 7, 20)
    whole = attn(None, z, last=last)
    monkeypatch.setattr("crosslight.engines.dense.CHUNK", 400)
    torch.testing.assert_close(attn(None, z, last=last), whole)


def test_bad_options_are_refused():
    for wrong in ({"kernel": 2}, {"queries": 0}):
        with pytest.raises(CrosslightError, match=next(iter(wrong))):
            made(**wrong)
    with pytest.raises(CrosslightError, match="last"):
        made()(*streams(), last=torch.zeros(2, 6, 19))
    with pytest.raises(CrosslightError, match="context_grid"):
        made(context_grid=(3, 3))(*streams())
