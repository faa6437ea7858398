"""Dual attention: the authors' package with the same weights, relations written out, what symbols may know."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.engines import dense
from crosslight.errors import CrosslightError

DIM, HEADS, D = 16, 4, 4
SOURCES = ["symbolic", "positional", "relative"]


def make(**options):
    options = {"dim": DIM, "heads": HEADS, "library": 6, "max_length": 32, "max_distance": 3, **options}
    return crosslight.create("dual-attention-transformer", **options).double()


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def written_out(attn, x, causal):
    """The docstring's equations, for one example, query by query and head by head."""
    n, (sensory, relational, relations) = len(x), (attn.sensory, attn.relational, attn.relations)
    q, k = (layer(x).view(n, HEADS, D) for layer in (attn.q, attn.k))
    qr, kr = (layer(x).view(n, relations, -1) for layer in (attn.q_related, attn.k_related))
    act = {"identity": lambda t: t, "tanh": torch.tanh}[attn.activation]
    w_s = attn.w_s.weight.view(relational, D, DIM)

    def symbol(i, j):
        source = attn.symbols
        if hasattr(source, "max_distance"):
            return source.library[max(-3, min(3, j - i)) + 3]
        if not hasattr(source, "templates"):
            return source.library[j]
        heads, asked = [], source.q(x[j]).view(source.heads, -1)
        width = asked.shape[1]
        for h in range(source.heads):
            part = slice(h * width, (h + 1) * width)
            found = (source.templates[:, part] @ asked[h] / width**0.5).softmax(0)
            heads.append(found @ source.library[:, part])
        return torch.cat(heads)

    rows = []
    for i in range(n):
        keys, sensed, related = range(i + 1 if causal else n), [], []
        for h in range(HEADS):
            alpha = torch.stack([q[i, h] @ k[j, h] / D**0.5 for j in keys]).softmax(0)
            if h < sensory:
                v = attn.v(x).view(n, sensory, D)
                sensed.append(sum(alpha[j] * v[j, h] for j in keys))
                continue
            g = h - sensory
            messages = []
            for j in keys:
                r = torch.stack([act(qr[i, c] @ kr[j, c] / qr.shape[-1] ** 0.5) for c in range(relations)])
                messages.append(attn.w_r[g] @ r + w_s[g] @ symbol(i, j))
            related.append(sum(a * message for a, message in zip(alpha, messages, strict=True)))
        parts = [attn.out_sensory(torch.cat(sensed))] if sensed else []
        rows.append(torch.cat([*parts, attn.out_relational(torch.cat(related))]))
    return torch.stack(rows)


@pytest.mark.parametrize("symbols", SOURCES)
@pytest.mark.parametrize(
    "options", [{}, {"relational": 4}, {"relational": 1, "relations": 2, "activation": "tanh"}, {"symmetric": True}]
)
def test_the_output_is_the_paper_written_out(symbols, options):
    attn, x = make(symbols=symbols, **options), stream(6, batch=1)
    for causal in (False, True):
        assert torch.allclose(attn(x, causal=causal)[0], written_out(attn, x[0], causal), atol=1e-10)


@pytest.mark.parametrize("symbols", ["symbolic", "relative"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_package_of_the_authors(symbols, symmetric, causal):
    pytest.importorskip("einops")
    package = pytest.importorskip("dual_attention.dual_attention")
    attn, x = make(symbols=symbols, relational=1, relations=2, symmetric=symmetric), stream(7)
    other = package.DualAttention(
        DIM,
        3,
        1,
        dropout=0.0,
        ra_kwargs={
            "n_relations": 2,
            "symmetric_rels": symmetric,
            "use_relative_positional_symbols": symbols == "relative",
        },
    ).double()
    mine, sensory, related = attn, other.self_attention, other.relational_attention
    split = 3 * D
    with torch.no_grad():
        for p, value in (
            (sensory.wq.weight, mine.q.weight[:split]),
            (sensory.wk.weight, mine.k.weight[:split]),
            (sensory.wv.weight, mine.v.weight),
            (sensory.wo.weight, mine.out_sensory.weight),
            (related.wq_attn.weight, mine.q.weight[split:]),
            (related.wk_attn.weight, mine.k.weight[split:]),
            (related.wq_rel.weight, mine.q_related.weight),
            (related.wk_rel.weight, mine.k_related.weight),
            (related.wr, mine.w_r),
            (related.wv.weight, mine.w_s.weight),
            (related.wo.weight, mine.out_relational.weight),
        ):
            p.copy_(value)
        if symbols == "symbolic":
            retriever = pytest.importorskip("dual_attention.symbol_retrieval").SymbolicAttention(DIM, 1, 6).double()
            retriever.q_proj.load_state_dict(mine.symbols.q.state_dict())
            retriever.template_features.copy_(mine.symbols.templates)
            retriever.symbol_library.copy_(mine.symbols.library)
            s = retriever(x)
        else:
            distance = (torch.arange(7) - torch.arange(7)[:, None]).clamp(-3, 3) + 3
            s = mine.symbols.library[distance]
        assert torch.allclose(attn(x, causal=causal), other(x, s, is_causal=causal)[0], atol=1e-10)


def test_without_relational_heads_it_is_multi_head_attention():
    attn, x, z = make(relational=0), stream(6), stream(4)
    plain = nn.MultiheadAttention(DIM, HEADS, bias=False, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]))
        plain.out_proj.load_state_dict(attn.out_sensory.state_dict())
    assert torch.allclose(attn(x, z), plain(x, z, z)[0], atol=1e-12)


def test_relations_know_inner_products_only():
    """A rotation before both projections of the relations, and its inverse in them, changes nothing; and rotated
    queries and keys of a relation give the same relation."""
    attn, x = make(relational=4, relations=2), stream(6)
    y = attn(x)
    turn = torch.linalg.qr(torch.randn(2, 8, 8, dtype=torch.double))[0]
    with torch.no_grad():
        for layer in (attn.q_related, attn.k_related):
            layer.weight.copy_((turn @ layer.weight.view(2, 8, DIM)).view(-1, DIM))
    assert torch.allclose(attn(x), y, atol=1e-12)
    with torch.no_grad():
        attn.k_related.weight.copy_((turn @ attn.k_related.weight.view(2, 8, DIM)).view(-1, DIM))
    assert not torch.allclose(attn(x), y, atol=1e-3)


def test_positional_symbols_carry_nothing_of_the_tokens():
    """With weights and relations fixed, what a relational head reads does not depend on its keys' features."""
    attn, x, z = make(relational=4, symbols="positional"), stream(5), stream(6).requires_grad_()
    nn.init.zeros_(attn.w_r)
    y = attn.read(torch.rand(2, HEADS, 5, 6).double(), x, z)
    (influence,) = torch.autograd.grad(y.sum(), z, allow_unused=True, materialize_grads=True)
    assert not influence.any()


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("symbols", SOURCES)
def test_rows_in_chunks_are_the_whole_tensor_of_relations(activation, symbols, monkeypatch):
    attn, x, z = make(activation=activation, symbols=symbols), stream(11), stream(7)
    calls = [lambda: attn(x), lambda: attn(x, causal=True), lambda: attn(x, z)]
    expected = [call() for call in calls]
    monkeypatch.setattr(dense, "CHUNK", 400)
    for call, y in zip(calls, expected, strict=True):
        assert torch.allclose(call(), y, atol=1e-12)


@pytest.mark.parametrize("symbols", SOURCES)
@pytest.mark.parametrize("position", [None, "rope"])
def test_decoding_of_the_variants_is_the_full_pass(symbols, position):
    attn, x = make(symbols=symbols, position=position), stream(9)
    for context in (None, stream(5)):
        cache, parts = None, []
        for i in range(9):
            y, cache = attn.step(x[:, i : i + 1], cache, context=context if i == 0 else None)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), attn(x, context, causal=True), atol=1e-10)


def test_layers_may_share_their_symbols():
    first, second = make(), make()
    second.symbols = first.symbols
    both = nn.ModuleList([first, second])
    alone = sum(p.numel() for p in make().parameters())
    shared = sum(p.numel() for p in first.symbols.parameters())
    assert sum(p.numel() for p in both.parameters()) == 2 * alone - shared


def test_bad_options_are_named():
    with pytest.raises(CrosslightError, match="relational: got 5, expected 0 to heads = 4"):
        make(relational=5)
    with pytest.raises(CrosslightError, match="relations: got 3, expected a divisor of 8"):
        make(relations=3)
    with pytest.raises(CrosslightError, match="position: got alibi"):
        make(position="alibi")
    with pytest.raises(CrosslightError, match="at most max_length = 32 tokens"):
        make(symbols="positional")(stream(33))
