"""Uni-Encoder: the arrow mask, positions that restart, and what candidates know of each other."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.uni_encoder import Arrow, Restarting, arrow
from crosslight.engines import sparse
from crosslight.engines.plans import block_table
from crosslight.errors import CrosslightError

L, C, R = 5, 3, 4
N = L + R * C


def make(**options):
    return crosslight.create("uni-encoder", **{"dim": 16, "heads": 2, "context": L, "candidate": C, **options}).double()


def stream(n: int = N) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.double, requires_grad=True)


def matrix(n: int = N, reads: bool = True, read: bool = True) -> torch.Tensor:
    keep = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            a, b = (0 if t < L else 1 + (t - L) // C for t in (i, j))
            keep[i, j] = a == b or (a == 0 and reads) or (b == 0 and read)
    return keep


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_the_rule_is_the_matrix_and_its_blocks_bound_it(reads, read):
    rule, keep = Arrow(L, C, reads, read), matrix(N, reads, read)
    assert torch.equal(rule.dense(1, 1, N, N)[0, 0], keep)
    for size in (1, 2, 4, 7):
        some, every = block_table(rule, N, N, size, size)
        for a, b in torch.cartesian_prod(torch.arange(some.shape[0]), torch.arange(some.shape[1])).tolist():
            block = keep[a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert some[a, b] or not block.any()
            assert block.all() or not every[a, b]


def test_parts_of_any_length_by_number():
    parts = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    keep = arrow(parts.expand(2, -1)).dense(2, 1, 8, 8)[0, 0]
    expected = (parts[:, None] == parts) | (parts[:, None] == 0) | (parts == 0)
    assert torch.equal(keep, expected)
    fixed = Arrow(L, C).part(torch.arange(N)).expand(2, -1)
    assert torch.equal(arrow(fixed).dense(2, 1, N, N)[0, 0], matrix())


def test_softmax_takes_the_mask():
    attn, plain, x = make(), crosslight.create("softmax", dim=16, heads=2).double(), stream()
    plain.load_state_dict(attn.state_dict())
    for mask in (Arrow(L, C), arrow(Arrow(L, C).part(torch.arange(N)).expand(2, -1)), matrix().expand(2, N, N)):
        torch.testing.assert_close(plain(x, mask=mask), attn(x))


def test_equals_sdpa_under_the_matrix():
    attn, x = make(), stream()
    q, k, v = (p(x).view(2, N, 2, 8).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=matrix())
    torch.testing.assert_close(attn(x), attn.out(y.transpose(1, 2).flatten(2)))


def test_permuting_candidates_permutes_their_states():
    attn, x = make(position="rope"), stream()
    order = torch.tensor([2, 0, 3, 1])
    token = torch.cat([torch.arange(L), (L + order[:, None] * C + torch.arange(C)).flatten()])
    torch.testing.assert_close(attn(x[:, token]), attn(x)[:, token])


def test_one_candidate_is_a_cross_encoder():
    attn, plain = make(position="rope"), crosslight.create("softmax", dim=16, heads=2, position="rope").double()
    plain.load_state_dict(attn.state_dict())
    x = stream()
    torch.testing.assert_close(attn(x[:, : L + C]), plain(x[:, : L + C]))
    # Each candidate reads what it would read in a pass of its own.
    for r in range(R):
        own = slice(L + r * C, L + (r + 1) * C)
        alone = plain(torch.cat([x[:, :L], x[:, own]], 1))[:, L:]
        torch.testing.assert_close(attn(x)[:, own], alone)


def test_candidates_touch_only_through_the_context():
    x = stream()
    for reads in (True, False):
        first, second = make(context_reads=reads), make(context_reads=reads)
        own = slice(L, L + C)

        def influence(y, own=own):
            return torch.autograd.grad(y[:, own].sum(), x)[0][:, L + C :].abs().max().item()

        assert influence(first(x)) == 0
        assert (influence(second(x + first(x))) > 0) == reads


def test_diag_makes_candidates_independent_of_the_context():
    x = stream()
    y = make(context_reads=False, candidates_read=False)(x)
    assert torch.autograd.grad(y[:, L:].sum(), x, retain_graph=True)[0][:, :L].abs().max() == 0
    assert torch.autograd.grad(y[:, :L].sum(), x)[0][:, L:].abs().max() == 0


def test_positions_restart():
    token = Restarting(8, L, C).positions(torch.arange(L + 2 * C + 1))
    assert token.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 5]


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_decoding_knows_where_it_stands(position):
    attn, x = make(position=position), stream()
    y, cache = attn.step(x[:, :7])
    parts = [y]
    for i in range(7, N):
        y, cache = attn.step(x[:, i : i + 1], cache)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), attn(x, causal=True))


def test_many_candidates_cost_what_each_reads():
    rule = Arrow(64, 32)
    area = sparse.plan(rule, False, 2048, 2048).area
    assert area < 0.15 * 2048**2


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="candidate: got 0"):
        make(candidate=0)
    with pytest.raises(CrosslightError, match="context: got -1"):
        make(context=-1)
