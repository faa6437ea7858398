"""Modality-mutual attention: the mask, what is read ahead, and decoding after a prefill."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.aki_mma import ModalityMutual, mutual
from crosslight.engines.plans import block_table
from crosslight.errors import CrosslightError

IMAGES, PROMPT, N = 5, 9, 14


def make(**options):
    return crosslight.create(
        "aki-mma", **{"dim": 16, "heads": 2, "images": IMAGES, "prompt": PROMPT, **options}
    ).double()


def stream(n: int = N) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.double, requires_grad=True)


def matrix(prompt: int = PROMPT, bidirectional: bool = False) -> torch.Tensor:
    keep = torch.ones(N, N, dtype=torch.bool).tril()
    keep[:IMAGES, IMAGES:prompt] = True
    if bidirectional:
        keep[:IMAGES, :IMAGES] = True
    return keep


@pytest.mark.parametrize("prompt", [IMAGES, PROMPT, None])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_rule_is_the_matrix_and_its_blocks_bound_it(prompt, bidirectional):
    rule, keep = ModalityMutual(IMAGES, prompt, bidirectional), matrix(N if prompt is None else prompt, bidirectional)
    assert torch.equal(rule.dense(1, 1, N, N)[0, 0], keep)
    for size in (1, 2, 3, 5):
        some, every = block_table(rule, N, N, size, size)
        for a, b in torch.cartesian_prod(torch.arange(some.shape[0]), torch.arange(some.shape[1])).tolist():
            block = keep[a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert some[a, b] or not block.any()
            assert block.all() or not every[a, b]


def test_tokens_named_one_by_one():
    token = torch.arange(N).expand(2, -1)
    keep = mutual(token < IMAGES, (token >= IMAGES) & (token < PROMPT)).dense(2, 1, N, N)
    assert torch.equal(keep, matrix().expand(2, 1, N, N))
    # Two images, of which each reads the text of the prompt and not the other.
    image, prompt = torch.tensor([[1, 1, 0, 1, 0, 0]]).bool(), torch.tensor([[0, 0, 1, 0, 1, 0]]).bool()
    keep = mutual(image, prompt).dense(1, 1, 6, 6)[0, 0]
    assert keep[0].tolist() == [True, False, True, False, True, False]
    assert keep[3].tolist() == [True, True, True, True, True, False]


def test_softmax_takes_the_mask_and_sdpa_agrees():
    attn, plain, x = make(), crosslight.create("softmax", dim=16, heads=2).double(), stream()
    plain.load_state_dict(attn.state_dict())
    torch.testing.assert_close(plain(x, mask=ModalityMutual(IMAGES, PROMPT)), attn(x))
    q, k, v = (p(x).view(2, N, 2, 8).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=matrix())
    torch.testing.assert_close(attn(x), attn.out(y.transpose(1, 2).flatten(2)))


def test_the_image_reads_the_prompt_and_never_the_answer():
    attn, x = make(), stream()
    first, second = attn(x), make()(x + attn(x))
    by = torch.autograd.grad(first[:, :IMAGES].sum(), x, retain_graph=True)[0]
    assert (by[:, IMAGES:PROMPT] != 0).any(-1).all()
    assert (by[:, PROMPT:] == 0).all()
    for i in range(PROMPT, N):  # no token reads an answer that comes after it, however deep
        deep = torch.autograd.grad(second[:, :i].sum(), x, retain_graph=True)[0]
        assert (deep[:, i:] == 0).all()


def test_rows_of_text_are_causal_and_without_an_image_all_are():
    x = stream()
    plain = crosslight.create("softmax", dim=16, heads=2).double()
    for images in (IMAGES, 0):
        attn = make(images=images)
        plain.load_state_dict(attn.state_dict())
        torch.testing.assert_close(attn(x)[:, images:], plain(x, causal=True)[:, images:])


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_prefill_and_cached_decoding_are_the_full_pass(position, bidirectional):
    attn, x = make(position=position, bidirectional=bidirectional), stream()
    y, cache = attn.step(x[:, :PROMPT])
    parts = [y]
    for i in range(PROMPT, N):
        y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x))


def test_what_comes_first_is_the_prompt_where_none_is_named():
    attn, named, x = make(prompt=None), make(prompt=7), stream()
    named.load_state_dict(attn.state_dict())
    y, cache = attn.step(x[:, :7])
    rest, _ = attn.step(x[:, 7:], cache)
    torch.testing.assert_close(torch.cat([y, rest], 1), named(x))


def test_bad_input_is_refused():
    with pytest.raises(CrosslightError, match="images: got -1"):
        make(images=-1)
    with pytest.raises(CrosslightError, match="prompt: got 3"):
        make(prompt=3)
    with pytest.raises(CrosslightError, match="x: got 4 tokens"):
        make().step(stream(4))
    with pytest.raises(CrosslightError, match="context"):
        make().step(stream(), context=stream())
