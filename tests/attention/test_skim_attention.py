"""Skim-Attention: layout alone decides, one matrix for all layers; parity with LayoutLM, BERT, MultiheadAttention."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.attention.skim_attention import Layout, Skimformer, cells, reading_order, skimming
from crosslight.engines import masks
from crosslight.errors import CrosslightError
from crosslight.testing import flops

N, DIM, H = 9, 16, 2


def make(**options):
    return crosslight.create("skim-attention", **{"dim": DIM, "heads": H, **options}).double()


def stream(n: int = N) -> torch.Tensor:
    return torch.randn(2, n, DIM, dtype=torch.double)


def page(batch: int = 2, n: int = N) -> torch.Tensor:
    corner, size = torch.randint(0, 800, (batch, n, 2)), torch.randint(1, 200, (batch, n, 2))
    return torch.cat([corner, corner + size], -1)


def test_equals_multihead_attention_on_layout_and_text():
    attn, x, boxes = make(), stream(), page()
    theirs = nn.MultiheadAttention(DIM, H, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.k.bias, attn.v.bias]))
        theirs.out_proj.load_state_dict(attn.out.state_dict())
    layout = attn.layout(boxes)
    y, weights = theirs(layout, layout, x, average_attn_weights=False)
    torch.testing.assert_close(attn(x, boxes=boxes), y)
    torch.testing.assert_close(attn.weights(x, boxes=boxes), weights)


def test_boxes_are_embedded_as_in_layoutlm():
    pytest.importorskip("transformers")
    from transformers import LayoutLMConfig
    from transformers.models.layoutlm.modeling_layoutlm import LayoutLMEmbeddings

    theirs = LayoutLMEmbeddings(LayoutLMConfig(vocab_size=10, hidden_size=DIM, num_attention_heads=H)).double().eval()
    ours, boxes = Layout(DIM).double(), page()
    with torch.no_grad():
        for table in (theirs.word_embeddings, theirs.position_embeddings, theirs.token_type_embeddings):
            table.weight.zero_()  # text has no part in it
        for name, table in ours.tables.items():
            table.weight.copy_(getattr(theirs, f"{name}_position_embeddings").weight)
    torch.testing.assert_close(ours(boxes), theirs(torch.zeros(2, N, dtype=torch.long), boxes))


def network(**options):
    sizes = {"vocab": 50, "dim": DIM, "layers": 3, "heads": H, "head_dim": 8, "hidden": 32, "layout_dim": 12}
    return Skimformer(**{**sizes, "layout_heads": 2, **options}).double()


@torch.no_grad()
def test_the_network_equals_bert_layers_that_are_given_the_matrix():
    pytest.importorskip("transformers")
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput

    config = BertConfig(hidden_size=DIM, intermediate_size=32, num_attention_heads=H)
    net, tokens, boxes = network(), torch.randint(0, 50, (2, N)), page()
    x, where = net.norm(net.words(tokens) + net.types.weight[0]), net.skim.layout(boxes)
    q, k = (p(where).view(2, N, H, 8) for p in (net.skim.q, net.skim.k))
    a = (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5).softmax(-1)
    torch.testing.assert_close(net.weights(boxes), a)
    for block in net.blocks:
        attend, inner, outer = (m(config).double().eval() for m in (BertSelfOutput, BertIntermediate, BertOutput))
        attend.dense.load_state_dict(block.out.state_dict())
        attend.LayerNorm.load_state_dict(block.norm1.state_dict())
        inner.dense.load_state_dict(block.mlp[0].state_dict())
        outer.dense.load_state_dict(block.mlp[2].state_dict())
        outer.LayerNorm.load_state_dict(block.norm2.state_dict())
        v = block.v(x).view(2, N, H, 8)
        x = attend(torch.einsum("bhij,bjhd->bihd", a, v).flatten(2), x)
        x = outer(inner(x), x)
    torch.testing.assert_close(net(tokens, boxes), x)


@torch.no_grad()
def test_the_layout_encoder_equals_bert():
    pytest.importorskip("transformers")
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    config = BertConfig(hidden_size=12, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    config._attn_implementation = "eager"
    theirs, net = BertEncoder(config).double().eval(), network(layout_layers=2)
    for mine, layer in zip(net.skim.encoder, theirs.layer, strict=True):
        own, inner = layer.attention.self, layer.attention.output
        pairs = [(own.query, mine.attend.q), (own.key, mine.attend.k), (own.value, mine.attend.v)]
        pairs += [(inner.dense, mine.attend.out), (inner.LayerNorm, mine.norm1), (layer.output.LayerNorm, mine.norm2)]
        pairs += [(layer.intermediate.dense, mine.mlp[0]), (layer.output.dense, mine.mlp[2])]
        for there, here in pairs:
            there.load_state_dict(here.state_dict())
    where = net.skim.layout(page())
    torch.testing.assert_close(net.skim.encoder(where), theirs(where)[0])


def test_only_the_boxes_count():
    attn, x, boxes = make(), stream(), page()
    a = attn.weights(x, boxes=boxes)
    assert torch.equal(attn.weights(torch.randn_like(x), boxes=boxes), a)
    moved = boxes.clone()
    moved[:, 3] += 40
    assert (attn.weights(x, boxes=moved) - a).abs().max() > 1e-3


def test_centres_see_no_sizes_and_order_sees_no_boxes():
    x, boxes = stream(), page()
    wider = boxes + torch.tensor([-3, 0, 3, 0])
    centres, order = make(layout="centres"), make(layout="order")
    wider[..., 0].clamp_(min=0)
    wider[..., 2] = (boxes[..., 0] + boxes[..., 2]) - wider[..., 0]
    torch.testing.assert_close(centres(x, boxes=wider), centres(x, boxes=boxes))
    assert (make()(x, boxes=wider) - make()(x, boxes=boxes)).abs().max() > 1e-6
    torch.testing.assert_close(order(x, boxes=page()), order(x))


def test_all_layers_share_one_softmax(monkeypatch):
    net, calls = network(), []
    weights = type(net.skim.core).weights
    monkeypatch.setattr(type(net.skim.core), "weights", lambda *a, **k: calls.append(1) or weights(*a, **k))
    net(torch.randint(0, 50, (2, N)), page())
    assert len(calls) == 1


def test_one_layout_serves_a_batch():
    net, tokens, boxes = network(), torch.randint(0, 50, (3, N)), page(1)
    keep = torch.arange(N) < torch.tensor([9, 4, 6])[:, None]
    torch.testing.assert_close(net(tokens, boxes), net(tokens, boxes.expand(3, -1, -1)))
    torch.testing.assert_close(net(tokens, boxes, mask=keep), net(tokens, boxes.expand(3, -1, -1), mask=keep))
    torch.testing.assert_close(net(tokens, boxes, mask=keep)[1, :4], net(tokens[1:2, :4], boxes[:, :4])[0])


def test_windows_read_what_the_mask_lets_through():
    near, full = network(window=4), network()
    full.load_state_dict(near.state_dict())
    tokens, boxes = torch.randint(0, 50, (2, N)), page()
    torch.testing.assert_close(near(tokens, boxes), full(tokens, boxes, mask=masks.window(2)))
    near, tokens, boxes = network(window=32).float(), torch.randint(0, 50, (1, 2048)), page(1, 2048)
    with torch.no_grad():
        assert flops.measure(lambda: near(tokens, boxes)).largest < 2048 * 2048


@pytest.mark.parametrize("k", [1, 4, N, N + 5])
@pytest.mark.parametrize("row", ["softmax", "sigmoid-attention"])
def test_any_row_takes_the_skimming_mask(k, row):
    attn, x, boxes = make(), stream(), page()
    a = attn.weights(x, boxes=boxes)
    keep = skimming(a, k).dense(2, H, N, N)
    assert (keep.sum(-1) == min(k, N)).all()
    assert (a.masked_fill(~keep, 2).amin(-1) >= a.masked_fill(keep, -1).amax(-1)).all()
    other = crosslight.create(row, dim=DIM, heads=H).double()
    torch.testing.assert_close(other(x, mask=skimming(a, k)), other(x, mask=keep))
    if k >= N:
        torch.testing.assert_close(other(x, mask=skimming(a, k)), other(x))


def test_boxes_that_are_not_given():
    attn, x = make(line=4), stream(12)
    boxes = reading_order(12, 4)
    assert boxes[0, 5].tolist() == [250, 250, 500, 500]
    torch.testing.assert_close(attn(x), attn(x, boxes=boxes))
    torch.testing.assert_close(attn(x, grid=(3, 4)), attn(x, boxes=cells((3, 4))))
    assert cells((2, 4))[0, -1].tolist() == [750, 500, 1000, 1000]
    assert reading_order(100, 4).max() == 1000


@pytest.mark.parametrize("layout", ["boxes", "order"])
def test_decoding_with_boxes(layout):
    attn, x, boxes, cache, parts = make(layout=layout), stream(), page(), None, []
    for i in range(N):
        y, cache = attn.step(x[:, i : i + 1], cache, boxes=boxes[:, i : i + 1])
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True, boxes=boxes))
    # A mask that lets the token be read does not make it forget the boxes.
    keep = torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(attn.step(x[:, :1], boxes=boxes[:, :1], mask=keep)[0], parts[0])
    with pytest.raises(CrosslightError, match="pattern"):
        attn.step(x[:, :1], context=x, boxes=boxes[:, :1])


def test_a_matrix_can_be_read_with_boxes():
    attn, x, boxes = make(), stream(), page()
    torch.testing.assert_close(attn.read(attn.weights(x, boxes=boxes), x, boxes=boxes), attn(x, boxes=boxes))


def test_the_base_network_has_the_size_of_its_parts():
    with torch.device("meta"):
        count = sum(p.numel() for p in Skimformer().parameters())
    width = 768
    layer = 4 * width + 2 * (width * width + width) + 2 * 4 * width * width + 5 * width
    skim = 4 * 1024 * width + 2 * width + 2 * (width * width + width)
    assert count == 30522 * width + 2 * width + 2 * width + skim + 12 * layer
    assert round(count / 1e6) == 99
    with torch.device("meta"):
        contextual = sum(p.numel() for p in Skimformer(**Skimformer.presets["base-contextual"]).parameters())
    bert = 4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 4 * width  # a layer over the layout
    assert contextual == count + 2 * bert


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="layout: got 'circles'"):
        make(layout="circles")
    with pytest.raises(CrosslightError, match="size: got 1000"):
        make(size=1000)
    with pytest.raises(CrosslightError, match="boxes: got"):
        make()(stream(), boxes=page(n=4))
    with pytest.raises(CrosslightError, match="boxes: got"):
        make()(stream(), boxes=page().double())
    with pytest.raises(CrosslightError, match=r"skimming\(k\)"):
        skimming(torch.rand(1, 1, 2, 2), 0)
