"""Monotonic location attention: its equations one query at a time, where it may move, and the flip of a context."""

import math

import pytest
import torch

import crosslight
from crosslight.attention.monotonic_location_attention import Directions, flipped
from crosslight.engines import dense
from crosslight.errors import CrosslightError

N, M, H, D = 6, 9, 2, 8
LENGTHS = (M, 5)


def make(**options):
    attn = crosslight.create("monotonic-location-attention", **{"dim": H * D, "heads": H, **options}).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return attn


def streams():
    return torch.randn(2, N, H * D, dtype=torch.double), torch.randn(2, M, H * D, dtype=torch.double)


def padding() -> torch.Tensor:
    return torch.arange(M) < torch.tensor(LENGTHS)[:, None]


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def written_out(attn, x, z):
    """Rows of one example without padding, in the paper's units, one query and head at a time."""
    s = len(z)
    p = [j / (s - 1) for j in range(s)]
    if attn.directions is not None:
        gate = attn.directions.gate
        g = sigmoid(5 * float(z[-1] @ gate.weight[0] + gate.bias))
        z = g * z + (1 - g) * z.flip(0)
    rows = torch.zeros(H, len(x), s, dtype=torch.double)
    for h in range(H):
        own = slice(h * D, (h + 1) * D)
        last = attn.start / (s - 1)
        for t in range(len(x)):
            where = attn.place(x[t])[own]
            sigma = (max(float(where @ attn.w_sigma[h, :, 0]), 0) + 0.27) / s
            r = float(where @ attn.w_rho[h, :, 0]) if attn.f != "one" else 0.0
            if attn.f == "mixed":
                b = sigmoid(float(attn.step_bias))
                step = b * max(r, 0) + (1 - b) * sigmoid(5 * r)
            elif attn.f == "stairs":
                r = max(r, 0)
                step = math.floor(r) + sigmoid(20 * (r - math.floor(r) - 0.5))
            else:
                step = {"one": 1.0, "relu": max(r, 0), "sigmoid": sigmoid(5 * r)}[attn.f]
            mu = last + step / (s - 1)
            bell = torch.tensor([math.exp(-((q - mu) ** 2) / (2 * sigma**2)) for q in p], dtype=torch.double)
            row = bell / bell.sum()
            if attn.content:
                content = ((attn.k(z)[:, own] @ attn.q(x[t])[own]) / math.sqrt(D)).softmax(0)
                g = sigmoid(float(attn.mix(x[t])))
                row = g * row + (1 - g) * content
            rows[h, t] = row
            last = float(row @ torch.tensor(p, dtype=torch.double))
    return rows, attn.v(z).view(s, H, D).transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("step", ["mixed", "relu", "sigmoid", "stairs", "one"])
@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize("directions", [True, False])
def test_equals_the_equations_one_query_at_a_time(step, content, directions):
    attn, (x, z) = make(step=step, content=content, directions=directions), streams()
    y, weights = attn(x, z, mask=padding()), attn.weights(x, z, mask=padding())
    for b, length in enumerate(LENGTHS):
        rows, v = written_out(attn, x[b], z[b, :length])
        torch.testing.assert_close(y[b], attn.out((rows @ v).transpose(0, 1).flatten(1)))
        if not directions:
            torch.testing.assert_close(weights[b, :, :, :length], rows)


@pytest.mark.parametrize("step", ["mixed", "relu", "sigmoid", "stairs", "one"])
def test_rows_sum_to_one_and_no_step_goes_back(step):
    attn, (x, z) = make(step=step), streams()
    torch.testing.assert_close(attn.weights(x, z, mask=padding()).sum(-1), torch.ones(2, H, N, dtype=torch.double))
    assert (attn.moves(100 * x, torch.double)[0] >= 0).all()
    assert (attn.moves(100 * x, torch.double)[0] > 0).any()


@pytest.mark.parametrize("step", ["mixed", "relu", "sigmoid", "stairs", "one"])
def test_the_place_read_last_does_not_go_back_but_for_rounding(step):
    """A narrow Gaussian's mean over whole keys is less than half a key from its own."""
    attn, (x, z) = make(step=step, content=False, directions=False), streams()
    with torch.no_grad():
        attn.w_sigma.zero_()
    places = (attn.weights(3 * x, z) * torch.arange(M)).sum(-1)
    assert (places.diff(dim=-1) > -0.5).all()
    assert (places[..., -1] > places[..., 0]).any()


def one_step(**options):
    attn = make(step="one", content=False, start=-1, floor=0.05, **options)
    with torch.no_grad():
        attn.w_sigma.zero_()
    return attn


def test_at_a_step_of_one_it_reads_key_after_key():
    attn, (x, z) = one_step(directions=False), streams()
    assert attn.weights(x, z).argmax(-1).tolist() == [[list(range(N))] * H] * 2


def test_turned_around_it_reads_from_the_last_key_of_each_length():
    attn, (x, z) = one_step(), streams()
    with torch.no_grad():
        attn.directions.gate.bias.fill_(-50)
    found = attn.weights(x[:, :5], z, mask=padding()).argmax(-1)
    for b, length in enumerate(LENGTHS):
        assert found[b].tolist() == [list(range(length - 1, length - 6, -1))] * H


def test_the_flip_respects_padding():
    z = streams()[1]
    turned = z.gather(1, flipped(padding()).unsqueeze(-1).expand_as(z))
    for b, length in enumerate(LENGTHS):
        assert torch.equal(turned[b, :length], z[b, :length].flip(0))
    holes = torch.tensor([[True, False, True, True, False]])
    assert flipped(holes).tolist() == [[3, 1, 2, 0, 4]]


def test_a_step_is_counted_in_keys_at_any_length():
    attn, (x, z) = one_step(directions=False), streams()
    longer = torch.cat([z, torch.randn(2, 300, H * D)], 1)
    weights = attn.weights(x, longer)
    torch.testing.assert_close(weights[..., :M], attn.weights(x, z))
    places = (weights * torch.arange(M + 300)).sum(-1)
    torch.testing.assert_close(places.diff(dim=-1), torch.ones(2, H, N - 1, dtype=torch.double))


def test_a_step_beyond_the_end_stays_at_the_last_key():
    attn, (x, z) = make(step="relu", content=False, directions=False), streams()
    weights = attn.weights(1e3 * x.abs(), z)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, N, dtype=torch.double))


@pytest.mark.parametrize("row", ["softmax", "agent-attention"])
def test_directions_serve_the_context_of_any_row(row):
    turn, attn, (x, z) = Directions(H * D).double(), crosslight.create(row, dim=H * D, heads=H).double(), streams()
    with torch.no_grad():
        turn.gate.weight.zero_()
        turn.gate.bias.fill_(-20)
    y = attn(x, turn(z, padding()), mask=padding())
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(y[b : b + 1], attn(x[b : b + 1], z[b : b + 1, :length].flip(1)))


def test_many_queries_are_taken_in_chunks(monkeypatch):
    attn, (x, z) = make(), streams()

    def run():
        y = attn(x, z)
        return y, *torch.autograd.grad(y.square().sum(), list(attn.parameters()))

    whole = run()
    monkeypatch.setattr(dense, "CHUNK", 4 * 4 * H * M)
    torch.testing.assert_close(run(), whole)


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="step: got 'two'"):
        make(step="two")
    with pytest.raises(CrosslightError, match="floor: got 0"):
        make(floor=0)
