"""Parity with torch.nn.MultiheadAttention put together by the paper's equations, and the row's invariants."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError
from crosslight.fusion.multi_source_decoder import MultiSourceDecoder

STRATEGIES = ["serial", "parallel", "flat", "hierarchical"]


def multihead(layer) -> nn.MultiheadAttention:
    """torch's attention with the weights of a layer."""
    dim, width = layer.q.in_features, layer.k.in_features
    other = nn.MultiheadAttention(dim, layer.heads, batch_first=True, kdim=width, vdim=width).to(layer.q.weight)
    with torch.no_grad():
        if width == dim:
            other.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
        else:
            other.q_proj_weight.copy_(layer.q.weight)
            other.k_proj_weight.copy_(layer.k.weight)
            other.v_proj_weight.copy_(layer.v.weight)
        other.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
    other.out_proj.load_state_dict(layer.out.state_dict())
    return other


def attend(layer, q, s, keep=None):
    return multihead(layer)(q, s, s, key_padding_mask=None if keep is None else ~keep, need_weights=False)[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parity_with_the_equations(strategy):
    block, streams = MultiSourceDecoder.sample(strategy=strategy)
    block, streams = block.double(), {n: t.double() for n, t in streams.items()}
    keep = {n: torch.rand(t.shape[:2]) > 0.3 for n, t in streams.items()}
    for mask in keep.values():
        mask[:, 0] = True
    q, text, image = streams.values()
    _, keep_text, keep_image = keep.values()
    n = block.norms[0](q)
    if strategy == "serial":
        expected = q + attend(block.attend[0], n, text, keep_text)
        expected = expected + attend(block.attend[1], block.norms[1](expected), image, keep_image)
    elif strategy == "flat":
        joined = torch.cat([text, block.align[1](image)], 1)
        expected = q + attend(block.attend[0], n, joined, torch.cat([keep_text, keep_image], 1))
    else:
        a, b = attend(block.attend[0], n, text, keep_text), attend(block.attend[1], n, image, keep_image)
        expected = q + a + b
        if strategy == "hierarchical":
            expected = torch.stack(
                [
                    q[:, i] + attend(block.combine, n[:, i : i + 1], torch.stack([a[:, i], b[:, i]], 1))[:, 0]
                    for i in range(q.shape[1])
                ],
                1,
            )
    torch.testing.assert_close(block(streams, keep)["decoder"], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_source_is_ordinary_cross_attention(strategy):
    block, streams = MultiSourceDecoder.sample(streams={"decoder": 16, "text": 16}, strategy=strategy)
    q, s = streams.values()
    context = block.attend[0](block.norms[0](q), s)
    if strategy == "hierarchical":  # followed by attention over one item, whose only weight is 1
        context = block.combine.out(block.combine.v(context))
    torch.testing.assert_close(block(streams)["decoder"], q + context)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_of_sources_matters_in_serial_only(strategy):
    block, streams = MultiSourceDecoder.sample(streams={"decoder": 16, "a": 16, "b": 16}, strategy=strategy)
    turned = MultiSourceDecoder({"decoder": 16, "b": 16, "a": 16}, 2, strategy=strategy)
    turned.load_state_dict(block.state_dict())
    for parts in (turned.norms, turned.attend):
        if len(parts) == 2:  # the parameters go with their source
            parts[0], parts[1] = parts[1], parts[0]
    same = torch.allclose(block(streams)["decoder"], turned(streams)["decoder"], atol=1e-6)
    assert same == (strategy != "serial")


def test_flat_shares_one_softmax_and_parallel_has_one_each():
    for strategy, total in (("flat", 1.0), ("parallel", 2.0)):
        block, streams = MultiSourceDecoder.sample(strategy=strategy)
        maps = block.weights(streams)
        assert list(maps) == [("decoder", "text"), ("decoder", "image")]
        rows = sum(w.sum(-1) for w in maps.values())
        torch.testing.assert_close(rows, torch.full((2, 2, 5), total))


def test_hierarchical_shows_which_source_each_position_chose():
    block, streams = MultiSourceDecoder.sample(strategy="hierarchical")
    chosen = block.weights(streams)["decoder", "sources"]
    assert chosen.shape == (2, 2, 5, 2)
    one = {name: t[1:, 3:4] if name == "decoder" else t[1:] for name, t in streams.items()}
    torch.testing.assert_close(chosen[1:, :, 3:4], block.weights(one)["decoder", "sources"])


def test_options_are_checked():
    with pytest.raises(CrosslightError, match="strategy: got 'both', expected one of serial"):
        crosslight.create("multi-source-decoder", streams={"decoder": 16, "a": 16}, heads=2, strategy="both")
