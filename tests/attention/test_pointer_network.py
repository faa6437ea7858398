"""Pointers: distributions over any number of inputs, blind to their order; the paper's network cell by cell."""

import itertools
import math

import pytest
import torch

import crosslight
from crosslight.attention.pointer_network import PointerNetwork
from crosslight.engines import dense

DIM = 8


def make(**options):
    return crosslight.create("pointer-network", **{"dim": DIM, **options}).double()


def stream(n, batch=2):
    return torch.randn(batch, n, DIM, dtype=torch.double)


def test_weights_are_the_score_pair_by_pair():
    attn, d, e = make(hidden=5), stream(3), stream(6)
    w_1, w_2, v = attn.score.w_1.weight, attn.score.w_2.weight, attn.score.v[0, :, 0]
    u = [
        [[(v @ torch.tanh(w_1 @ e[b, j] + w_2 @ d[b, i])).item() for j in range(6)] for i in range(3)] for b in range(2)
    ]
    p = torch.tensor(u, dtype=torch.double).softmax(-1)
    assert torch.allclose(attn.weights(d, e)[:, 0], p, atol=1e-12)
    assert torch.allclose(attn.log_probabilities(d, e)[:, 0], p.log(), atol=1e-12)
    assert torch.equal(attn.point(d, e)[:, 0], p.argmax(-1))
    assert torch.allclose(attn(d, e), attn.out(torch.einsum("bij,bjc->bic", p, e)), atol=1e-12)


@pytest.mark.parametrize("m", [1, 4, 31])
def test_there_are_as_many_entries_as_inputs_and_they_sum_to_one(m):
    p = make().weights(stream(3), stream(m))
    assert p.shape == (2, 1, 3, m)
    assert torch.allclose(p.sum(-1), torch.ones(2, 1, 3).double())


def test_a_permutation_of_the_inputs_permutes_the_distribution():
    attn, d, e, order = make(), stream(3), stream(7), torch.randperm(7)
    assert torch.allclose(attn.weights(d, e[:, order]), attn.weights(d, e)[..., order], atol=1e-12)


def test_masked_positions_have_no_probability():
    attn, d, e = make(), stream(3), stream(7)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool().expand(2, 7)
    assert not attn.weights(d, e, mask=keep)[..., ~keep[0]].any()
    log = attn.log_probabilities(d, e, mask=keep)
    assert (log[..., ~keep[0]] == -math.inf).all()
    assert torch.allclose(log[..., keep[0]], attn.log_probabilities(d, e[:, keep[0]]), atol=1e-12)
    assert keep[0][attn.point(d, e, mask=keep)].all()


def test_a_row_with_nothing_to_point_at_is_not_nan():
    attn, d, e = make(), stream(3), stream(7)
    keep = torch.arange(7) < torch.tensor([[4], [0]])
    log = attn.log_probabilities(d, e, mask=keep)
    assert (log[1] == -math.inf).all()
    log[0, ..., :4].sum().backward()
    assert all(p.grad.isfinite().all() for p in attn.score.parameters())


def test_queries_in_chunks_are_all_queries_at_once(monkeypatch):
    attn, x = make(heads=2), stream(9)
    expected = attn(x), attn(x, causal=True)
    monkeypatch.setattr(dense, "CHUNK", 600)
    assert torch.allclose(attn(x), expected[0], atol=1e-12)
    assert torch.allclose(attn(x, causal=True), expected[1], atol=1e-12)


# The network --------------------------------------------------------------------------------------------------------
@pytest.fixture
def net():
    net = crosslight.create("pointer-network", preset="tiny").double()
    for p in net.parameters():  # sharper than it starts, so that sequences differ
        torch.nn.init.normal_(p, std=0.6)
    return net


def cell(lstm, x, h, c):
    i, f, g, o = (lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def step_by_step(net, points, sequence):
    """log p of every entry at each step, for one example."""
    h = c = torch.zeros(32, dtype=torch.double)
    states = []
    for point in points:
        h, c = cell(net.encoder, point, h, c)
        states.append(h)
    states.append(net.end)
    rows, x = [], net.start
    for chosen in sequence:
        h, c = cell(net.decoder, x, h, c)
        u = [net.score.v[0, :, 0] @ torch.tanh(net.score.w_1(e) + net.score.w_2(h)) for e in states]
        rows.append(torch.stack(u).log_softmax(0))
        x = points[min(chosen, len(points) - 1)]
    return torch.stack(rows)


def test_the_network_is_the_paper_cell_by_cell(net):
    points = torch.rand(2, 4, 2, dtype=torch.double)
    targets = torch.tensor([[2, 0, 3, 4], [1, 4, 4, 4]])
    log = net(points, targets)
    assert log.shape == (2, 4, 5)
    assert torch.allclose(log.exp().sum(-1), torch.ones(2, 4).double())
    assert torch.allclose(log[0], step_by_step(net, points[0], [2, 0, 3, 4]), atol=1e-12)
    assert torch.allclose(log[1, :2], step_by_step(net, points[1], [1, 4]), atol=1e-12)


@pytest.mark.parametrize("n", [3, 9, 20])
def test_one_network_takes_any_number_of_inputs(net, n):
    points = torch.rand(2, n, 2, dtype=torch.double)
    assert net(points, torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, n + 1)
    assert net.decode(points).shape == (2, n + 1)


def test_greedy_decoding_takes_the_best_of_each_step(net):
    points = torch.rand(3, 5, 2, dtype=torch.double)
    found = net.decode(points)
    best = net(points, found).argmax(-1)
    for mine, right in zip(found.tolist(), best.tolist(), strict=True):
        ends = mine.index(5) + 1 if 5 in mine else len(mine)
        assert mine[:ends] == right[:ends]
        assert all(step == 5 for step in mine[ends:])


def test_tours_visit_every_input_once_and_a_wide_beam_finds_the_best(net):
    points = torch.rand(2, 4, 2, dtype=torch.double)
    tours = net.decode(points, beam=24, once=True)
    assert torch.equal(tours.sort(-1).values, torch.arange(5).expand(2, 5))
    assert (tours[:, -1] == 4).all()

    def value(b, tour):
        """log p of a tour where what was visited cannot be chosen again."""
        scores = step_by_step(net, points[b], tour)
        total, left = 0.0, list(range(4))
        for row, chosen in zip(scores, tour, strict=False):
            total += (row[chosen] - row[left].logsumexp(0)).item()
            left.remove(chosen)
        return total

    for b in range(2):
        best = max(itertools.permutations(range(4)), key=lambda tour: value(b, list(tour)))
        assert tours[b, :4].tolist() == list(best)


def test_parameters_are_two_lstms_and_the_pointer():
    with torch.device("meta"):
        net = PointerNetwork(**PointerNetwork.presets["paper"])
    h, inputs = 256, 2
    lstm = 4 * h * (inputs + h) + 8 * h
    assert sum(p.numel() for p in net.parameters()) == 2 * lstm + 2 * h * h + h + inputs + h
    small = PointerNetwork(hidden=32)
    assert all(p.abs().max() <= 0.08 for p in small.parameters())
