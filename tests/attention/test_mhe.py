"""Head embeddings: parameter counts, the single-head limit, what tells heads apart."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError

HEADS, D = 4, 8
DIM = HEADS * D


def make(**options):
    return crosslight.create("mhe", **{"dim": DIM, "heads": HEADS, **options}).double()


@pytest.fixture
def x():
    return torch.randn(2, 7, DIM, dtype=torch.double)


def test_parameters_are_the_published_count():
    attn, plain = make(bias=False), crosslight.create("softmax", dim=DIM, heads=HEADS, bias=False)
    count = sum(p.numel() for n, p in attn.named_parameters() if not n.startswith("out"))
    assert count == 3 * HEADS * D**2 + 3 * HEADS * D
    full = sum(p.numel() for n, p in plain.named_parameters() if not n.startswith("out"))
    assert full - count == (3 * HEADS**2 - 3 * HEADS) * D**2 - 3 * HEADS * D


@pytest.mark.parametrize("variant", ["add", "mul"])
def test_zero_embeddings_make_all_heads_equal(variant, x):
    attn = make(variant=variant)
    assert not torch.allclose(*attn.weights(x)[:, :2].unbind(1))
    nn.init.zeros_(attn.embeddings)
    first, *others = attn.weights(x).unbind(1)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("variant", ["add", "mul"])
def test_one_head_without_embedding_is_plain_attention(variant, x):
    attn = make(heads=1, variant=variant)
    nn.init.zeros_(attn.embeddings)
    plain = nn.MultiheadAttention(DIM, 1, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        plain.out_proj.load_state_dict(attn.out.state_dict())
    assert torch.allclose(attn(x), plain(x, x, x)[0], atol=1e-12)


@pytest.mark.parametrize("variant", ["add", "mul"])
def test_heads_are_the_paper_written_out(variant, x):
    attn = make(variant=variant)
    q, k, v = attn.q(x), attn.k(x), attn.v(x)
    e = attn.embeddings[:, :, 0]
    heads = []
    for i in range(HEADS):
        change = (lambda t, e: t + e) if variant == "add" else (lambda t, e: t * (e + 1))
        qi, ki, vi = change(q, e[0, i]), change(k, e[1, i]), change(v, e[2, i])
        heads.append((qi @ ki.transpose(1, 2) / D**0.5).softmax(-1) @ vi)
    assert torch.allclose(attn(x), attn.out(torch.cat(heads, -1)), atol=1e-12)


def test_bad_variant_is_named():
    with pytest.raises(CrosslightError, match="variant: got 'sum', expected one of mul, add"):
        make(variant="sum")
