"""MESH: marginals, the written-out gradient against autograd, hardness, ties, and the authors' algorithm."""

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.mesh_slot_attention import entropy_slope, mesh, sinkhorn
from crosslight.errors import CrosslightError

DIM, INPUTS, SLOTS = 16, 12, 4


def made(**options):
    return crosslight.create("mesh-slot-attention", dim=DIM, **{"slots": SLOTS} | options).double().eval()


def streams():
    return torch.randn(2, SLOTS, DIM, dtype=torch.float64), torch.randn(2, INPUTS, DIM, dtype=torch.float64)


def problem(batch=3, slots=SLOTS, inputs=INPUTS, uniform=False):
    """Costs and marginals, inputs first as in the paper."""
    cost = torch.rand(batch, inputs, slots, dtype=torch.float64)
    a, b = (torch.randn(batch, n, dtype=torch.float64) * (not uniform) for n in (inputs, slots))
    return cost, slots * a.softmax(1), slots * b.softmax(1)


def ours(cost, a, b):
    return cost.mT.unsqueeze(1), a.log()[:, None, None, :], b.log()[:, None, :, None]


def transport(cost, a, b, u=None, v=None, rounds=5):
    """The paper's Sinkhorn, (batch, inputs, slots)."""
    v = torch.zeros_like(b) if v is None else v
    for _ in range(rounds):
        u = a.log() - (v.unsqueeze(1) - cost).logsumexp(2)
        v = b.log() - (u.unsqueeze(2) - cost).logsumexp(1)
    return (u.unsqueeze(2) + v.unsqueeze(1) - cost).exp(), u, v


def entropy(plan):
    return torch.special.entr(plan.clamp(1e-20, 1)).mean((1, 2)).sum()


def official(cost, a, b, lr=1.0, steps=4):
    """The authors' algorithm, whose steps are constants for autograd."""
    u = v = None
    for _ in range(steps):
        cost = cost if cost.requires_grad else cost.clone().requires_grad_()
        plan, u, v = transport(cost, a, b, u, v)
        (slope,) = torch.autograd.grad(entropy(plan), cost, retain_graph=True)
        cost = cost - lr * slope / slope.norm(dim=(1, 2), keepdim=True)
    return transport(cost, a, b, u, v)[0]


def test_marginals_are_met():
    cost, a, b = problem()
    plan = sinkhorn(*ours(cost, a, b), rounds=200)[0][:, 0]
    torch.testing.assert_close(plan.sum(1), a)
    torch.testing.assert_close(plan.sum(2), b)
    torch.testing.assert_close(a.sum(1), b.sum(1))
    # After any number of rounds the slots' are.
    torch.testing.assert_close(mesh(*ours(cost, a, b))[:, 0].sum(2), b)


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_the_slope_of_the_entropy_is_that_of_autograd(rounds, warm):
    cost, a, b = problem()
    cost = (3 * cost).requires_grad_()
    v = torch.randn_like(b) if warm else None
    (expected,) = torch.autograd.grad(entropy(transport(cost, a, b, None, v, rounds)[0]), cost)
    flat, log_a, log_b = ours(cost.detach(), a, b)
    plan, us, vs = sinkhorn(flat, log_a, log_b, v=None if v is None else v[:, None, :, None], rounds=rounds)
    torch.testing.assert_close(entropy_slope(flat, plan, log_a, log_b, us, vs)[:, 0].mT, expected)


@pytest.mark.parametrize("lr", [1.0, 5.0])
def test_equals_the_authors_algorithm(lr):
    cost, a, b = problem()
    expected = official(cost, a, b, lr)
    torch.testing.assert_close(mesh(*ours(cost, a, b), lr=lr)[:, 0].mT, expected, atol=1e-9, rtol=1e-9)
    # Gradients too, where the steps are constants.
    x, y = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    out = official(x, a, b, lr)
    toward = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, toward)
    straight = mesh(*ours(y, a, b), lr=lr, straight_through=True)[:, 0].mT
    torch.testing.assert_close(torch.autograd.grad(straight, y, toward)[0], expected, atol=1e-9, rtol=1e-7)
    full = torch.autograd.grad(mesh(*ours(y, a, b), lr=lr)[:, 0].mT, y, toward)[0]
    assert (full - expected).abs().max() > 1e-3


def test_the_plan_is_harder_than_sinkhorns():
    cost, a, b = problem(batch=20)
    for one in zip(cost, a, b, strict=True):
        args = ours(*(t[None] for t in one))
        assert entropy(mesh(*args)[:, 0]) < entropy(sinkhorn(*args)[0][:, 0])


def test_with_long_steps_it_is_a_permutation():
    plan = mesh(*ours(*problem(batch=40, slots=5, inputs=5, uniform=True)), lr=5.0, steps=8)[:, 0]
    assert (plan.amax(-1) > 0.99).double().mean() > 0.9
    best = plan.argmax(-1)
    assert sum(len(set(row.tolist())) == 5 for row in best) >= 36


def test_it_is_near_the_best_assignment():
    assign = pytest.importorskip("scipy.optimize").linear_sum_assignment
    for size, least in ((1.0, 0.5), (5.0, 0.65)):
        cost, a, b = problem(batch=100, slots=5, inputs=5, uniform=True)
        found = mesh(*ours(size * cost, a, b))[:, 0].argmax(-1)  # the input of each slot
        same = [assign(c.mT.numpy())[1].tolist() == f.tolist() for c, f in zip(cost, found, strict=True)]
        assert sum(same) / 100 > least


def test_identical_slots_part_under_mesh_only():
    _, z = streams()
    x = torch.randn(2, 1, DIM, dtype=torch.float64).expand(-1, 2, -1)
    plain = crosslight.create("slot-attention", dim=DIM).double()
    soft = made(mesh_steps=0, noise=0.0)
    hard = made(mesh_steps=8, mesh_lr=5.0)
    for attn in (plain, soft):
        first, second = attn.weights(x, z)[:, 0].unbind(1)
        torch.testing.assert_close(first, second)
    first, second = hard.weights(x, z)[:, 0].unbind(1)
    assert ((first - second).abs().sum(-1) > 0.5).all()


@pytest.mark.parametrize("cost", ["cosine", "dot", "l2"])
def test_equals_the_rounds_written_out(cost):
    attn, (x, z) = made(cost=cost, mlp_hidden=24), streams()
    noise = attn._noise(x, INPUTS)[0].mT
    for b in range(2):
        slots, seen = x[b : b + 1], attn.norm_context(z[b : b + 1])
        k, v = seen @ attn.k.weight.T, seen @ attn.v.weight.T
        share = SLOTS * attn.share_inputs(seen).squeeze(2).softmax(1)
        for _ in range(3):
            asking = attn.norm_slots(slots)
            q = asking @ attn.q.weight.T
            c = {
                "cosine": 1 - F.cosine_similarity(k.unsqueeze(2), q.unsqueeze(1), dim=-1),
                "dot": -(k @ q.mT) / DIM**0.5,
                "l2": (k.unsqueeze(2) - q.unsqueeze(1)).norm(dim=-1),
            }[cost]
            plan = official(c.detach() + noise, share, SLOTS * attn.share_slots(asking).squeeze(2).softmax(1))
            slots = attn.gru((plan.mT @ v).flatten(0, 1), slots.flatten(0, 1))[None]
            slots = slots + attn.mlp(attn.norm_mlp(slots))
        torch.testing.assert_close(attn(x, z)[b], slots[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(attn.weights(x, z)[b, 0], plan[0].mT, atol=1e-6, rtol=1e-6)


def test_without_noise_slots_and_inputs_are_exchangeable():
    attn, (x, z) = made(noise=0.0), streams()
    order, others = torch.randperm(SLOTS), torch.randperm(INPUTS)
    torch.testing.assert_close(attn(x[:, order], z[:, others]), attn(x, z)[:, order], atol=1e-7, rtol=1e-6)


def test_noise_is_drawn_in_training_and_fixed_in_evaluation():
    attn, (x, z) = made(), streams()
    assert torch.equal(attn(x, z), attn(x, z))
    attn.train()
    assert not torch.equal(attn(x, z), attn(x, z))
    pattern = attn.eval()._noise(x, INPUTS)
    assert pattern.abs().max() <= 0.001
    assert pattern.unique().numel() > 0.9 * pattern.numel()


@pytest.mark.parametrize("padded", [False, True])
def test_read_does_the_last_round_with_a_given_matrix(padded):
    attn, (x, z) = made(heads=2), streams()
    mask = torch.arange(INPUTS) < torch.tensor([[INPUTS], [5]]) if padded else None
    weights = attn.weights(x, z, mask=mask)
    torch.testing.assert_close(attn.read(weights, x, z, mask=mask), attn(x, z, mask=mask))
    torch.testing.assert_close(weights.sum((-2, -1)), torch.full((2, 2), float(SLOTS), dtype=torch.float64))
    if padded:
        torch.testing.assert_close(attn(x[1:], z[1:, :5]), attn(x, z, mask=mask)[1:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("cost", "cos"), ("mesh_steps", -1), ("sinkhorn_rounds", 0)])
def test_bad_options_are_named(name, value):
    with pytest.raises(CrosslightError, match=f"{name}: got"):
        made(**{name: value})
