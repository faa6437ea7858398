"""Agent attention: the equations written out cell by cell, the rank of its matrix, what padding may not touch."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.agent_attention import AgentAttention, ClassAgents, Network
from crosslight.attention.base import How
from crosslight.engines import masks
from crosslight.errors import CrosslightError

DIM, HEADS, D = 12, 3, 4


def make(**options):
    return crosslight.create("agent-attention", **{"dim": DIM, "heads": HEADS, "agents": 4, **options}).double()


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def bilinear(table, height, width):
    """(7, 7) -> (height, width) with pixel centres at half coordinates, cell by cell."""
    out = torch.empty(height, width, dtype=table.dtype)
    for r in range(height):
        for c in range(width):
            y, x = (max((p + 0.5) * 7 / size - 0.5, 0) for p, size in ((r, height), (c, width)))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 6), min(x0 + 1, 6)
            top = (1 - (x - x0)) * table[y0, x0] + (x - x0) * table[y0, x1]
            bottom = (1 - (x - x0)) * table[y1, x0] + (x - x0) * table[y1, x1]
            out[r, c] = (1 - (y - y0)) * top + (y - y0) * bottom
    return out


def written_out(attn, x, height, width, side):
    """The docstring's equations for one image, with a loop for every index."""
    q, k, v = (layer(x).view(height, width, HEADS, D) for layer in (attn.q, attn.k, attn.v))
    heads, core = [], attn.core
    for h in range(HEADS):
        agents = torch.stack(
            [
                q[
                    i * height // side : -(-(i + 1) * height // side),
                    j * width // side : -(-(j + 1) * width // side),
                    h,
                ].mean((0, 1))
                for i in range(side)
                for j in range(side)
            ]
        )
        keys, values, queries = (t[:, :, h].reshape(-1, D) for t in (k, v, q))
        gather, read = agents @ keys.T / math.sqrt(D), queries @ agents.T / math.sqrt(D)
        if core.window is not None:
            for a in range(side * side):
                b1, b2 = (
                    bilinear(core.table[w, h, a], height, width) + core.rows[w, h, a] + core.columns[w, h, a]
                    for w in (0, 1)
                )
                gather[a] = gather[a] + b1.flatten()
                read[:, a] = read[:, a] + b2.flatten()
        y = (read.softmax(-1) @ (gather.softmax(-1) @ values)).view(height, width, D)
        kernel, bias = attn.conv.weight[h * D : (h + 1) * D, 0], attn.conv.bias[h * D : (h + 1) * D]
        padded = F.pad(v[:, :, h], (0, 0, 1, 1, 1, 1))
        local = sum(padded[r : r + height, c : c + width] * kernel[:, r, c] for r in range(3) for c in range(3))
        heads.append(y + local + bias)
    return attn.out(torch.cat(heads, -1).view(-1, DIM))


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7)])
def test_equations(window, height, width):
    attn, x = make(window=(height, width) if window else None), stream(height * width)
    if window:
        for table in (attn.core.table, attn.core.rows, attn.core.columns):
            torch.nn.init.normal_(table)
    y = attn(x, grid=(height, width))
    for b in range(2):
        assert torch.allclose(y[b], written_out(attn, x[b], height, width, side=2), atol=1e-12)


def test_matrix_has_rank_of_the_agents_and_rows_that_sum_to_one():
    attn, x = make(conv=False, agents=5), stream(17)
    a = attn.weights(x)
    assert torch.allclose(a.sum(-1), torch.ones((), dtype=a.dtype))
    assert torch.linalg.matrix_rank(a).max() <= 5
    v = attn.v(x).view(2, 17, HEADS, D).transpose(1, 2)
    assert torch.allclose(attn(x), attn.out((a @ v).transpose(1, 2).flatten(2)), atol=1e-12)


def test_an_agent_a_query_without_grid():
    """With as many agents as tokens, pooling is the identity: two softmax attentions in a row."""
    attn, x = make(conv=False, agents=9), stream(9)
    q, k, v = (layer(x).view(2, 9, HEADS, D).transpose(1, 2) for layer in (attn.q, attn.k, attn.v))
    inner = F.scaled_dot_product_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q, q, inner).transpose(1, 2).flatten(2)
    assert torch.allclose(attn(x), attn.out(expected), atol=1e-12)


def test_convolution_is_of_the_stream_itself_only():
    attn, x, z = make(), stream(9), stream(9)
    plain = make(conv=False)
    plain.load_state_dict({name: t for name, t in attn.state_dict().items() if not name.startswith("conv")})
    assert torch.allclose(attn(x, z), plain(x, z), atol=1e-12)
    assert not torch.allclose(attn(x), plain(x))


def test_padding_shortens_the_stream():
    """Masked tokens enter neither the agents nor the convolution: the pool of the kept cells is what remains."""
    attn, x = make(agents=1), stream(8)
    keep = torch.arange(8) < torch.tensor([[5], [8]])
    assert torch.allclose(attn(x, mask=keep)[0, :4], attn(x[:1, :5])[0, :4], atol=1e-12)


@pytest.mark.parametrize(("keep", "grid"), [([5, 8, 12], None), ([5, 8, 12], (3, 4))])
def test_padding_reaches_no_other_token(keep, grid):
    """Of x as the query, pooled into agents, as the key and as the value, read and convolved."""
    attn, x = make(), stream(12, batch=3).requires_grad_()
    mask = torch.arange(12) < torch.tensor(keep)[:, None]
    (g,) = torch.autograd.grad(attn(x, mask=mask, grid=grid)[mask].sum(), x)
    assert not g[~mask].any()
    assert g[mask].all()


def test_a_core_alone_is_told_what_enters_its_agents():
    """A host that has no layer of ours says whether a call is self-attention; the padding of a context is not x's."""
    core, keep = AgentAttention(HEADS, D, agents=1), torch.arange(8) < torch.tensor([[5], [8]])
    assert core.extra(How(masks.keys(keep)))["pooled"] is keep
    assert core.extra(How(masks.keys(keep), cross=True)) == {}
    q, k, v = torch.randn(3, 2, HEADS, 8, D)
    how = How(masks.keys(keep))
    y = core(q, k, v, mask=how.mask, **core.extra(how))
    assert torch.allclose(y[:1, :, :5], core(*(t[:1, :, :5] for t in (q, k, v))), atol=1e-6)


def test_bad_grids_are_named():
    with pytest.raises(CrosslightError, match="agents: got 5"):
        make(agents=5)(stream(16), grid=(4, 4))
    with pytest.raises(CrosslightError, match="grid"):
        make(window=(4, 4))(stream(16), grid=(2, 8))
    with pytest.raises(CrosslightError, match="agents: got 49"):
        make(agents=49, window=(4, 4))


def test_a_class_token_is_read_and_asks_but_is_not_pooled():
    layer = ClassAgents.build(12, 3, agents=4, window=(3, 4)).double()
    core, x = layer.core, torch.randn(2, 13, 12, dtype=torch.double)
    q, k, v = (p(x).unflatten(2, (3, 4)).transpose(1, 2) for p in (layer.q, layer.k, layer.v))
    image = q[:, :, 1:].mT.reshape(2, 12, 3, 4)
    a = F.adaptive_avg_pool2d(image, 2).reshape(2, 3, 4, 4).mT
    gathering, reading = core._biases()  # (heads, agents, places), held to the equations above
    gathering = torch.cat([core.own[0].expand(3, 4, 1), gathering], 2)
    reading = torch.cat([core.own[1].expand(3, 4, 1), reading], 2)
    agents = (a @ k.mT / 2 + gathering).softmax(-1) @ v
    y = ((q @ a.mT / 2 + reading.mT).softmax(-1) @ agents).transpose(1, 2).flatten(2)
    y[:, 1:] += layer.conv(layer.v(x)[:, 1:].mT.reshape(2, 12, 3, 4)).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.out(y))
    torch.testing.assert_close(layer.read(layer.weights(x), x), layer(x))


@pytest.mark.parametrize("design", ["deit", "pvt", "swin", "cswin"])
def test_networks_run(design):
    sizes = {"dims": [8], "depths": [2], "heads": [2], "mlp_ratios": [2], "agents": [4], "agent_blocks": [1]}
    model = Network(design=design, image=16, patch=4, window=2, classes=10, **sizes)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    with_agents, plain = model.stages[0].blocks
    assert isinstance(with_agents.attend.core, AgentAttention)
    assert not isinstance(getattr(plain.attend, "core", None), AgentAttention)


def test_agents_or_blocks_of_another_number_of_stages_are_refused():
    for name in ("agents", "agent_blocks"):
        with pytest.raises(CrosslightError, match=f"{name}: got"):
            Network([8], [2], [2], **{"mlp_ratios": [2], "agents": [4], "agent_blocks": [1], name: [1, 1]})


def test_sizes_are_those_of_the_authors_table():
    millions = {"deit_tiny": 6.0, "deit_small": 22.7, "deit_small_448": 23.1, "deit_base": 87.2}
    millions |= {"pvt_tiny": 11.6, "pvt_small": 20.6, "pvt_medium": 35.9, "pvt_medium_256": 36.1, "pvt_large": 48.7}
    for preset, expected in millions.items():
        with torch.device("meta"):
            model = crosslight.create("agent-attention", preset=preset)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=0.06)
    for preset, expected in {
        "swin_tiny": 29,
        "swin_small": 50,
        "swin_base": 88,
        "cswin_small": 33,
        "cswin_base": 73,
    }.items():
        with torch.device("meta"):
            model = crosslight.create("agent-attention", preset=preset)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == expected
