"""EE-MLLM: text reads everything before it, image tokens keep to themselves, and nothing quadratic in the image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crosslight
from crosslight.attention.ee_mllm import Alone, composite
from crosslight.engines import masks
from crosslight.engines.plans import block_table
from crosslight.errors import CrosslightError
from crosslight.testing import flops

IMAGES, TEXT = 6, 7
N = IMAGES + TEXT


def make(**options):
    return crosslight.create("ee-mllm", **{"dim": 16, "heads": 2, "images": IMAGES, **options}).double()


def stream(n: int = N) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.double)


def matrix() -> torch.Tensor:
    keep = torch.zeros(N, N, dtype=torch.bool)
    for i in range(N):
        for j in range(N):
            keep[i, j] = i == j if i < IMAGES else j <= i
    return keep


def test_equals_full_attention_under_the_mask():
    attn, x = make(), stream()
    q, k, v = (p(x).view(2, N, 2, 8).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=matrix())
    torch.testing.assert_close(attn(x, causal=True), attn.out(y.transpose(1, 2).flatten(2)))


def test_the_rule_is_the_matrix_and_its_blocks_bound_it():
    rule = Alone(IMAGES) & masks.causal()
    assert torch.equal(rule.dense(1, 1, N, N)[0, 0], matrix())
    for size in (1, 2, 4, 5):
        some, every = block_table(rule, N, N, size, size)
        for a, b in torch.cartesian_prod(torch.arange(some.shape[0]), torch.arange(some.shape[1])).tolist():
            block = matrix()[a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert some[a, b] or not block.any()
            assert block.all() or not every[a, b]


@pytest.mark.parametrize("row", ["softmax", "sigmoid-attention", "cog-attention"])
def test_any_row_takes_the_mask(row):
    attn, x = crosslight.create(row, dim=16, heads=2).double(), stream()
    image = (torch.arange(N) < IMAGES).expand(2, N)
    expected = attn(x, mask=matrix().expand(2, N, N))
    torch.testing.assert_close(attn(x, mask=Alone(IMAGES), causal=True), expected)
    torch.testing.assert_close(attn(x, mask=composite(image)), expected)
    assert (attn(x, causal=True) - expected).abs().max() > 1e-6


def test_softmax_under_the_mask_is_the_layer():
    attn, plain, x = make(), crosslight.create("softmax", dim=16, heads=2).double(), stream()
    plain.load_state_dict(attn.state_dict())  # the same names: no parameter is new
    torch.testing.assert_close(plain(x, mask=Alone(IMAGES), causal=True), attn(x, causal=True))


def test_images_named_one_by_one():
    image = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    keep = composite(image).dense(1, 1, 6, 6)[0, 0]
    for i in range(6):
        assert torch.equal(keep[i], torch.arange(6) == i if image[0, i] else torch.arange(6) <= i)


def test_visual_tokens_advance_by_the_layers_own_weights():
    attn, norm, ffn, x = make(), nn.LayerNorm(16).double(), nn.Linear(16, 16).double(), stream()
    h = x + attn(norm(x), causal=True)
    h = h + ffn(norm(h))
    v = x[:, :IMAGES]
    v = v + attn.out(attn.v(norm(v)))
    v = v + ffn(norm(v))
    torch.testing.assert_close(h[:, :IMAGES], v)


def test_a_masked_visual_token_reads_nothing():
    attn, x = make(), stream()
    keep = torch.ones(2, N, dtype=torch.bool)
    keep[0, 2] = False
    y = attn(x, mask=keep, causal=True)
    torch.testing.assert_close(y[0, 2], attn.out.bias)
    torch.testing.assert_close(y[1], attn(x, causal=True)[1])


def test_nothing_is_quadratic_in_the_image():
    layers = {n: crosslight.create("ee-mllm", dim=16, heads=2, images=n) for n in (512, 2048)}
    with torch.no_grad():
        cost = {}
        for n, attn in layers.items():
            x = torch.randn(1, n + TEXT, 16)
            cost[n] = flops.measure(lambda attn=attn, x=x: attn(x, causal=True))
    assert cost[2048].largest <= 2 * (2048 + TEXT) * 16
    assert flops.growth(cost[512].flops, cost[2048].flops, 4) < 1.05


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_prefill_then_tokens_equals_the_full_pass(position):
    attn, x = make(position=position), stream()
    y, cache = attn.step(x[:, : IMAGES + 2])
    parts = [y]
    for i in range(IMAGES + 2, N):
        y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True))


def test_without_images_it_is_causal_attention():
    attn, plain, x = make(images=0), crosslight.create("softmax", dim=16, heads=2).double(), stream()
    plain.load_state_dict(attn.state_dict())
    torch.testing.assert_close(attn(x, causal=True), plain(x, causal=True))


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="images: got -1"):
        make(images=-1)
    with pytest.raises(CrosslightError, match=r"composite\(image\)"):
        composite(torch.ones(3))
