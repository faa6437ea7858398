"""Hierarchical attention: segments apart, what passes between them and when, and the masks."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.hat_long_document import Leaders, hierarchical
from crosslight.engines import masks
from crosslight.engines.plans import block_table, plan
from crosslight.errors import CrosslightError

K, S = 4, 3
N = K * S


def make(**options):
    return crosslight.create("hat-long-document", **{"dim": 16, "heads": 2, "segment": K, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, N, 16, dtype=torch.double, requires_grad=True)


def attend(layer, t):
    q, k, v = (p(t).unflatten(-1, (2, 8)).transpose(1, 2) for p in (layer.q, layer.k, layer.v))
    return layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_without_the_cross_segment_part_segments_are_apart(x):
    attn = make(across=False)
    apart = attend(attn.within, x.view(2 * S, K, 16)).view(2, N, 16)
    torch.testing.assert_close(attn(x), apart)
    torch.testing.assert_close(attn(x[:, : N - 1])[:, : N - K], apart[:, : N - K])


def test_equals_the_two_attentions_written_out(x):
    attn = make()
    y = attend(attn.within, x.view(2 * S, K, 16)).view(2, S, K, 16)
    z = attend(attn.across, attn.norm(x.view(2, S, K, 16)[:, :, 0] + y[:, :, 0] + attn.places[:S]))
    expected = torch.cat([y[:, :, :1] + z[:, :, None], y[:, :, 1:]], 2).flatten(1, 2)
    torch.testing.assert_close(attn(x), expected)


def test_other_segments_reach_words_one_layer_later(x):
    first, second, apart = make(), make(), make(across=False)
    y = x + first(x)
    own = torch.arange(N) // K == 1
    words = own & (torch.arange(N) % K != 0)

    def influence(out, rows):
        return (torch.autograd.grad(out[:, rows].sum(), x, retain_graph=True)[0] != 0).any(-1).any(0)

    assert torch.equal(influence(y, words), own)
    assert influence(y, torch.arange(N) == K).all()
    assert influence(y + apart(y), words).all()
    assert influence(y + second(y), words).all()
    # Without a part across, two layers keep segments apart.
    z = x + apart(x)
    assert torch.equal(influence(z + apart(z), words), own)


def test_one_segment_is_attention_and_a_layer_on_one_token(x):
    attn, plain = make(), crosslight.create("softmax", dim=16, heads=2).double()
    plain.load_state_dict(attn.within.state_dict())
    one = x[:, :K]
    y = plain(one)
    torch.testing.assert_close(attn(one)[:, 1:], y[:, 1:])
    extra = attn.across.out(attn.across.v(attn.norm(one[:, :1] + y[:, :1] + attn.places[:1])))
    torch.testing.assert_close(attn(one)[:, :1], y[:, :1] + extra)


def test_the_matrices_are_those_under_the_masks(x):
    attn, plain = make(), crosslight.create("softmax", dim=16, heads=2).double()
    within, across = attn.weights(x).chunk(2, 1)
    plain.load_state_dict(attn.within.state_dict())
    torch.testing.assert_close(plain.weights(x, mask=masks.same_block(K)), within)
    plain.load_state_dict(attn.across.state_dict())
    asks = attn.norm(x + attn.within(x, mask=masks.same_block(K)) + attn.places[torch.arange(N) // K])
    torch.testing.assert_close(plain.weights(asks, mask=Leaders(K)), across)


def test_an_empty_segment_is_not_read(x):
    attn = make()
    keep = torch.arange(N).expand(2, -1) < 2 * K
    torch.testing.assert_close(attn(x, mask=keep)[:, : 2 * K], attn(x[:, : 2 * K]))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_masks_and_their_blocks(size):
    i, n = torch.arange(23), 23
    leads = (i % size == 0)[:, None] & (i % size == 0)
    both = leads | (i[:, None] // size == i // size)
    for mask, keep in ((Leaders(size), leads), (hierarchical(size), both)):
        assert torch.equal(mask.dense(1, 1, n, n)[0, 0], keep)
        assert torch.equal(masks.unpack(*masks.pack(mask)).dense(1, 1, n, n)[0, 0], keep)
        for side in (1, 2, 4):
            some, every = block_table(mask, n, n, side, side)
            for a, b in torch.cartesian_prod(torch.arange(some.shape[0]), torch.arange(some.shape[1])).tolist():
                block = keep[a * side : (a + 1) * side, b * side : (b + 1) * side]
                assert some[a, b] or not block.any()
                assert block.all() or not every[a, b]


def test_within_segments_the_work_is_linear_in_their_number():
    areas = [plan(masks.same_block(128), False, n, n).area for n in (1024, 4096)]
    assert areas == [1024 * 128, 4096 * 128]


def test_bad_input_is_refused(x):
    with pytest.raises(CrosslightError, match="segment: got 0"):
        make(segment=0)
    with pytest.raises(CrosslightError, match="x: got 3 segments"):
        make(segments=2)(x)
