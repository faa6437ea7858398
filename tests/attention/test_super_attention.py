"""Optimised, efficient and super attention: identity projections, the kernel, parameter counts."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError

DIM, HEADS, N, L = 12, 3, 7, 9


def made(variant: str, **options) -> nn.Module:
    attn = crosslight.create("super-attention", **{"dim": DIM, "heads": HEADS, "variant": variant, **options})
    if getattr(attn, "align", None) is not None:
        nn.init.normal_(attn.align, std=0.5)
    return attn.double()


@pytest.fixture
def x():
    return torch.randn(2, N, DIM, dtype=torch.double)


@pytest.mark.parametrize("variant", ["optimised", "efficient"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_equals_plain_attention_with_identity_projections(variant, heads, x):
    attn = made(variant, heads=heads)
    plain = nn.MultiheadAttention(DIM, heads, batch_first=True).double()
    eye, none = torch.eye(DIM).double(), torch.zeros(DIM).double()
    keys = (attn.k.weight, attn.k.bias) if variant == "optimised" else (eye, none)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, keys[0], eye]))
        plain.in_proj_bias.copy_(torch.cat([attn.q.bias, keys[1], none]))
        plain.out_proj.load_state_dict(attn.out.state_dict())
    torch.testing.assert_close(attn(x), plain(x, x, x)[0])


def test_super_with_the_identity_is_efficient(x):
    attn, efficient = made("super", max_length=L), made("efficient")
    nn.init.eye_(attn.align)
    efficient.load_state_dict({n: t for n, t in attn.state_dict().items() if n != "align"})
    torch.testing.assert_close(attn(x), efficient(x))
    torch.testing.assert_close(attn(x, causal=True), efficient(x, causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_super_is_the_paper_written_out(causal, x):
    attn = made("super", max_length=L)
    d, q, kernel = DIM // HEADS, attn.q(x), attn.align[:N, :N]
    heads = []
    for h in range(HEADS):
        z = x[..., h * d : (h + 1) * d]
        scores = q[..., h * d : (h + 1) * d] @ z.transpose(1, 2) / d**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ (kernel.tril() if causal else kernel) @ z)
    torch.testing.assert_close(attn(x, causal=causal), attn.out(torch.cat(heads, -1)))


@pytest.mark.parametrize(
    ("variant", "count"), [("optimised", 3 * DIM**2), ("efficient", 2 * DIM**2), ("super", 2 * DIM**2 + L**2)]
)
def test_parameters_are_the_published_count(variant, count):
    assert sum(p.numel() for p in made(variant, bias=False, max_length=L).parameters()) == count


@pytest.mark.parametrize(("variant", "invariant"), [("optimised", True), ("efficient", True), ("super", False)])
def test_only_super_knows_the_order_of_the_keys(variant, invariant, x):
    attn, z = made(variant, max_length=L), torch.randn(2, L, DIM, dtype=torch.double)
    assert torch.allclose(attn(x, z), attn(x, z.flip(1))) == invariant


@pytest.mark.parametrize("variant", ["optimised", "efficient", "super"])
@pytest.mark.parametrize("cross", [False, True])
def test_decoding_equals_the_full_pass(variant, cross, x):
    attn = made(variant, max_length=L)
    z = torch.randn(2, L, DIM, dtype=torch.double) if cross else None
    cache, parts = None, []
    with torch.no_grad():
        for i in range(N):
            y, cache = attn.step(x[:, i : i + 1], cache, context=z if i == 0 else None)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), attn(x, z, causal=True))


def test_efficient_caches_the_states_alone(x):
    attn, cache = made("efficient"), None
    for i in range(N):
        _, cache = attn.step(x[:, i : i + 1], cache)
    assert cache.state.nbytes == x.numel() * x.element_size()


def test_a_longer_context_than_the_kernel_is_refused(x):
    with pytest.raises(CrosslightError, match="context: got 7 tokens, expected at most max_length = 5"):
        made("super", max_length=5)(x)
