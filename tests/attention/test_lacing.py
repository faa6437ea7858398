"""LACING: two softmaxes that do not compete, decoding, and guidance by a soft image."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.lacing import SoftImage, guided
from crosslight.errors import CrosslightError

IMAGES, N = 5, 12


def make(**options):
    return crosslight.create("lacing", **{"dim": 16, "heads": 2, "images": IMAGES, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, 16, dtype=torch.double, requires_grad=True)


def heads(attn, x):
    return [p(x).view(2, N, 2, 8).transpose(1, 2) for p in (attn.q, attn.k, attn.v)]


@pytest.mark.parametrize("visual", [1.0, 0.5])
def test_equals_sdpa_on_both_sets_of_keys(x, visual):
    attn = make(visual=visual)
    q, k, v = heads(attn, x)
    see = F.scaled_dot_product_attention(q, k[:, :, :IMAGES], v[:, :, :IMAGES])
    read = F.scaled_dot_product_attention(*(t[:, :, IMAGES:] for t in (q, k, v)), is_causal=True)
    read = torch.cat([torch.zeros_like(q[:, :, :IMAGES]), read], 2)  # the image reads no text
    torch.testing.assert_close(attn(x), attn.out((visual * see + read).transpose(1, 2).flatten(2)))


def test_rows_of_both_sum_to_one(x):
    see, read = make().weights(x).chunk(2, 1)
    torch.testing.assert_close(see.sum(-1), torch.ones(2, 2, N, dtype=torch.double))
    torch.testing.assert_close(read.sum(-1)[..., IMAGES:], torch.ones(2, 2, N - IMAGES, dtype=torch.double))
    assert (see[..., IMAGES:] == 0).all()
    assert (read[..., :IMAGES] == 0).all()
    assert (read.triu(1) == 0).all()


def test_without_images_it_is_causal_attention(x):
    attn, plain = make(images=0), crosslight.create("softmax", dim=16, heads=2).double()
    plain.load_state_dict(attn.state_dict())
    torch.testing.assert_close(attn(x), plain(x, causal=True))


def test_louder_text_takes_nothing_from_the_image(x):
    attn = make()
    q, k, _ = heads(attn, x)
    text = (torch.arange(N) >= IMAGES).double()
    raised = 3 * text.view(1, 1, 1, N)
    before, after = attn.core.weights(q, k), attn.core.weights(q, k, bias=raised)
    torch.testing.assert_close(after, before)
    joint = crosslight.create("softmax", dim=16, heads=2).core
    assert (joint.weights(q, k, bias=raised) - joint.weights(q, k))[..., :IMAGES].max() < -1e-6


def test_text_is_causal_and_the_image_sees_itself(x):
    y = make()(x)
    for i in range(N):
        seen = (torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] != 0).any(-1).any(0)
        assert seen.tolist() == [j < IMAGES or (i >= IMAGES and j <= i) for j in range(N)]


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_prefill_and_cached_decoding_are_the_full_pass(x, position):
    attn = make(position=position)
    y, cache = attn.step(x[:, : IMAGES + 2])
    parts = [y]
    for i in range(IMAGES + 2, N):
        y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x))
    with pytest.raises(CrosslightError, match="x: got 1 tokens"):
        attn.step(x[:, :1])


def test_guidance():
    logits, prior = torch.randn(2, 3, 11, dtype=torch.double)
    torch.testing.assert_close(guided(logits, prior, 0.0), logits.log_softmax(-1))
    for w in (0.5, 2.0):
        torch.testing.assert_close(guided(logits, logits, w), logits.log_softmax(-1))
        out = guided(logits, prior, w)
        torch.testing.assert_close(out.exp().sum(-1), torch.ones(3, dtype=torch.double))
        # The odds between two tokens are those with the image, to the power 1 + w, over those of the prior, to w.
        a, b, c = (t[:, 0] - t[:, 1] for t in (out, logits, prior))
        torch.testing.assert_close(a, (1 + w) * b - w * c)


def test_the_cut_leaves_unlikely_tokens_out():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    out = guided(logits, torch.zeros(1, 4), 1.0, cut=0.2)
    assert out.isinf().tolist() == [[False, False, False, True]]
    with pytest.raises(CrosslightError, match="cut: got 2"):
        guided(logits, logits, cut=2)


def test_the_soft_image_stands_in_where_asked():
    soft, image = SoftImage(IMAGES, 16), torch.randn(3, IMAGES, 16)
    out = soft(image, torch.tensor([False, True, False]))
    assert torch.equal(out[::2], image[::2])
    assert torch.equal(out[1], soft.prompt)
    out.sum().backward()
    assert (soft.prompt.grad == 1).all()
