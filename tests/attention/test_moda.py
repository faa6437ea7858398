"""MODA: aligned keys against the aligner written out, what it leaves alone, and the mask of modalities."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.moda import Modular
from crosslight.engines import masks
from crosslight.errors import CrosslightError

IMAGES, TEXT, D = 5, 6, 8
N = IMAGES + TEXT


def make(*, fresh: bool = False, **options):
    attn = crosslight.create("moda", **{"dim": 2 * D, "heads": 2, "images": IMAGES, **options}).double()
    if not fresh:
        with torch.no_grad():
            for p in attn.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return attn


def stream(n: int = N) -> torch.Tensor:
    return torch.randn(2, n, 2 * D, dtype=torch.double)


def heads(attn, x, name):
    return getattr(attn, name)(x).view(*x.shape[:2], 2, D).transpose(1, 2)


def written_out(attn, x, last: int, duplex: bool):
    """The aligned keys, one head and one token at a time."""
    k, v = heads(attn, x, "k"), heads(attn, x, "v")
    out = k.clone()
    for b in range(len(x)):
        for h in range(2):

            def unit(j, b=b, h=h):
                key = k[b, h, j] + 1e-6
                return key / key.norm()

            def gram(tokens, b=b, h=h, unit=unit):
                g = sum(torch.outer(unit(j), v[b, h, j]) for j in tokens)
                return torch.stack([row / row.norm() for row in g])

            text, image = gram(range(IMAGES, last)), gram(range(IMAGES))
            for j in range(x.shape[1]):
                if j < IMAGES:
                    out[b, h, j] = attn.fuse_v.weight @ (k[b, h, j] + attn.ratio_v * (unit(j) @ text))
                elif duplex:
                    out[b, h, j] = attn.fuse_t.weight @ (k[b, h, j] + attn.ratio_t * (unit(j) @ image))
    return out


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("prompt", [None, IMAGES + 3])
def test_equals_the_aligner_written_out(duplex, prompt):
    attn, x = make(duplex=duplex, prompt=prompt), stream()
    k = written_out(attn, x, prompt or N, duplex)
    scores = heads(attn, x, "q") @ k.mT / math.sqrt(D)
    weights = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf).softmax(-1)
    torch.testing.assert_close(attn.weights(x), weights)
    y = attn.out((weights @ heads(attn, x, "v")).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), y)


def test_starts_as_causal_attention():
    attn, x = make(fresh=True), stream()
    q, k, v = (heads(attn, x, name) for name in "qkv")
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attn(x), attn.out(y.transpose(1, 2).flatten(2)))


def test_without_duplex_only_visual_keys_change():
    attn, x = make(duplex=False), stream()
    raw, aligned = attn._keys(x), attn._heads(x, x, attn._checked(x, None, None, False, None)[2])[1]
    assert torch.equal(aligned[:, :, IMAGES:], raw[:, :, IMAGES:])
    assert ((aligned - raw)[:, :, :IMAGES].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("duplex", [True, False])
def test_text_alone_is_left_as_it_is(duplex):
    attn, x = make(images=0, duplex=duplex), stream()
    plain = crosslight.create("softmax", dim=2 * D, heads=2).double()
    plain.load_state_dict({name: t for name, t in attn.state_dict().items() if name in plain.state_dict()})
    torch.testing.assert_close(attn(x), plain(x, causal=True))


def test_the_basis_does_not_grow_with_the_sequence():
    attn = make()
    for n in (3, 300):
        k, v = torch.randn(2, 1, 2, n, D, dtype=torch.double)
        basis = attn.basis(k, v)
        assert basis.shape == (1, 2, D, D)
        torch.testing.assert_close(basis.norm(dim=-1), torch.ones(1, 2, D, dtype=torch.double))


def test_an_image_without_text_has_no_basis_to_go_by():
    attn, x = make(), stream(IMAGES)
    assert attn(x).isfinite().all()
    keep = torch.arange(N) < IMAGES
    with_text = torch.cat([x, stream(TEXT)], 1)
    torch.testing.assert_close(attn(with_text, mask=keep.expand(2, N))[:, :IMAGES], attn(x))


def test_the_answer_is_read_by_nothing_before_it():
    prompt = IMAGES + 3
    attn, x = make(prompt=prompt), stream().requires_grad_()
    for i in range(N):
        after = max(prompt, i + 1)
        grad = torch.autograd.grad(attn(x)[:, i].sum(), x)[0][:, after:]
        assert grad.abs().sum() == 0
    assert torch.autograd.grad(attn(x)[:, 1].sum(), x)[0][:, IMAGES:prompt].abs().min() > 0  # through the basis


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_prefill_then_tokens_equals_the_full_pass(position, duplex, bidirectional):
    prompt = IMAGES + 2
    attn, x = make(position=position, duplex=duplex, bidirectional=bidirectional, prompt=prompt), stream()
    y, cache = attn.step(x[:, :prompt])
    parts = [y]
    for i in range(prompt, N):
        y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x))


def test_modular_is_a_rule_for_each_pair():
    rule = Modular(IMAGES, None, masks.sink(0), masks.window(4), masks.causal())
    keep = rule.dense(1, 1, N, N)[0, 0]
    for i in range(N):
        for j in range(N):
            if i < IMAGES:
                assert keep[i, j] == (j < IMAGES)
            else:
                assert keep[i, j] == (abs(i - j) <= 4 if j < IMAGES else j <= i)


@pytest.mark.parametrize("row", ["softmax", "sigmoid-attention"])
def test_any_row_takes_the_mask(row):
    attn, x = crosslight.create(row, dim=16, heads=2).double(), stream()
    causal = masks.causal()
    rule = Modular(IMAGES, None, causal, causal, causal)
    seen = torch.ones(N, N).tril().bool()
    seen[:IMAGES, :IMAGES] = True
    torch.testing.assert_close(attn(x, mask=rule), attn(x, mask=seen.expand(2, N, N)))


def test_bidirectional_is_that_mask():
    attn, x = make(bidirectional=True), stream()
    above = attn.weights(x).triu(1)
    assert (above[:, :, :IMAGES, :IMAGES] > 0).any()
    assert above[:, :, :, IMAGES:].abs().max() == 0


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="images: got -1"):
        make(images=-1)
    with pytest.raises(CrosslightError, match="prompt: got 2"):
        make(prompt=2)
    with pytest.raises(CrosslightError, match="x: got 3 tokens"):
        make().step(stream(3))
