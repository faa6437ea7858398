"""Mean pooling: softmax attention with nothing to choose by."""

import pytest
import torch

import crosslight
from crosslight.engines import masks

DIM = 12


def pooled() -> torch.nn.Module:
    return crosslight.create("mean-pooling", dim=DIM, heads=3).double()


def streams(n: int = 7, m: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, n, DIM, dtype=torch.float64), torch.randn(2, m, DIM, dtype=torch.float64)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "keys", "window"])
def test_equals_softmax_attention_without_queries(cross, causal, mask):
    attn, softmax = pooled(), crosslight.create("softmax", dim=DIM, heads=3).double()
    softmax.load_state_dict(attn.state_dict() | {k: v for k, v in softmax.state_dict().items() if k[0] in "qk"})
    torch.nn.init.zeros_(softmax.q.weight)
    torch.nn.init.zeros_(softmax.q.bias)
    x, z = streams()
    context = z if cross else None
    length = 5 if cross else 7
    keep = {
        "none": None,
        "keys": torch.arange(length) < torch.tensor([[3], [length]]),
        "window": masks.window(2) | masks.sink(1),
    }[mask]
    how = {"context": context, "mask": keep, "causal": causal}
    torch.testing.assert_close(attn(x, **how), softmax(x, **how))
    torch.testing.assert_close(attn.weights(x, **how), softmax.weights(x, **how))


def test_is_the_mean():
    attn, (x, z) = pooled(), streams()
    torch.testing.assert_close(attn(x, z)[:, 3], attn.out(attn.v(z).mean(1)))
    torch.testing.assert_close(attn(x, causal=True)[:, 3], attn.out(attn.v(x[:, :4]).mean(1)))


def test_has_no_queries_and_no_keys():
    count = sum(p.numel() for p in pooled().parameters())
    assert count == 2 * (DIM * DIM + DIM)


@pytest.mark.parametrize("n", [3, 7])
def test_a_causal_mask_over_a_context_of_another_length(n):
    attn, (x, z) = pooled(), streams(n)
    expected = torch.stack([attn.out(attn.v(z[:, : i + 1]).mean(1)) for i in range(n)], 1)
    torch.testing.assert_close(attn(x, z, mask=masks.causal()), expected)


def test_decodes_several_tokens_at_a_time():
    attn, (x, _) = pooled(), streams(9)
    cache, parts = None, []
    for start in range(0, 9, 3):
        y, cache = attn.step(x[:, start : start + 3], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True))


def test_masked_values_may_be_anything():
    """Padding that holds infinities must not become NaN through 0 * inf."""
    attn, (x, z) = pooled(), streams()
    keep = torch.arange(5) < torch.tensor([[3], [2]])
    expected = attn(x, z, mask=keep)
    assert torch.equal(attn(x, z.masked_fill(~keep.unsqueeze(-1), torch.inf), mask=keep), expected)
