"""Slot attention against the slot-attention package, and the invariants of the paper."""

import pytest
import torch

import crosslight
from crosslight.errors import CrosslightError

DIM, INPUTS = 16, 20


def made(**options) -> torch.nn.Module:
    return crosslight.create("slot-attention", dim=DIM, **{"slots": 4} | options).double()


def streams(slots: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, slots, DIM, dtype=torch.float64), torch.randn(2, INPUTS, DIM, dtype=torch.float64)


def by_hand(attn, slots, z, iterations):
    """The paper's algorithm 1 with the GRU written out, for one image and one head."""
    gates = attn.gru
    z = attn.norm_context(z)
    k, v = z @ attn.k.weight.T, z @ attn.v.weight.T
    for _ in range(iterations):
        q = attn.norm_slots(slots) @ attn.q.weight.T
        share = torch.softmax(k @ q.T / DIM**0.5, dim=1) + attn.eps  # inputs x slots
        w = share / share.sum(0, keepdim=True)
        read = w.T @ v
        ir, iz, inew = (read @ gates.weight_ih.T + gates.bias_ih).chunk(3, 1)
        hr, hz, hnew = (slots @ gates.weight_hh.T + gates.bias_hh).chunk(3, 1)
        reset, keep = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        slots = (1 - keep) * torch.tanh(inew + reset * hnew) + keep * slots
        hidden = torch.relu(attn.norm_mlp(slots) @ attn.mlp[0].weight.T + attn.mlp[0].bias)
        slots = slots + hidden @ attn.mlp[2].weight.T + attn.mlp[2].bias
    return slots, w


@pytest.mark.parametrize("iterations", [1, 3])
def test_equals_the_algorithm_written_out(iterations):
    attn, (x, z) = made(iterations=iterations), streams()
    for b in range(2):
        slots, w = by_hand(attn, x[b], z[b], iterations)
        torch.testing.assert_close(attn(x, z)[b], slots)
        torch.testing.assert_close(attn.weights(x, z)[b, 0], w.T)


def test_equals_the_slot_attention_package():
    package = pytest.importorskip("slot_attention")
    theirs = package.SlotAttention(num_slots=4, dim=DIM, iters=3, hidden_dim=32).double()
    ours = made(mlp_hidden=32)
    names = {"slots_mu": "mean", "slots_logsigma": "log_deviation", "norm_input": "norm_context"}
    names |= {"to_q": "q", "to_k": "k", "to_v": "v", "norm_pre_ff": "norm_mlp", "fc1": "mlp.0", "fc2": "mlp.2"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("to_") and name.endswith("bias"):
            tensor.zero_()  # theirs has biases in the projections, which the authors' code does not
            continue
        first, _, rest = name.partition(".")
        state[f"{names.get(first, first)}{'.' * bool(rest)}{rest}"] = tensor
    state["mean"], state["log_deviation"] = state["mean"][0], state["log_deviation"][0]
    ours.load_state_dict(state)
    _, z = streams()
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = theirs(z)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(None, z), expected)


def test_inputs_share_themselves_out_and_rows_sum_to_one():
    attn, (x, z) = made(iterations=1), streams()
    weights = attn.weights(x, z)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 4, dtype=torch.float64))
    # Before the rows are normalised, what the slots take of an input adds up to 1 for every input.
    q = attn.q(attn.norm_slots(x)) / DIM**0.5
    shares = (q @ attn.k(attn.norm_context(z)).mT).softmax(1)
    torch.testing.assert_close(weights[:, 0], shares / shares.sum(-1, keepdim=True))


def test_order_of_inputs_does_not_matter_and_slots_are_exchangeable():
    attn, (x, z) = made(), streams()
    y = attn(x, z)
    torch.testing.assert_close(attn(x, z[:, torch.randperm(INPUTS)]), y)
    order = torch.randperm(4)
    torch.testing.assert_close(attn(x[:, order], z), y[:, order])


def test_one_slot_reads_the_plain_mean():
    attn, (x, z) = made(), streams(1)
    torch.testing.assert_close(attn.weights(x, z), torch.full((2, 1, 1, INPUTS), 1 / INPUTS, dtype=torch.float64))


def test_the_number_of_slots_may_change_after_training():
    attn = made(slots=4)
    attn.slots = 6
    assert attn(None, streams()[1]).shape == (2, 6, DIM)


def test_slots_are_drawn_from_the_learned_normal():
    attn = made(slots=2000, iterations=1)
    with torch.no_grad():
        attn.mean.normal_()
        attn.log_deviation.normal_()
    drawn = attn._start(None, torch.zeros(4, 1, DIM, dtype=torch.float64))
    torch.testing.assert_close(drawn.mean((0, 1)), attn.mean[0], atol=0.2, rtol=0.1)
    torch.testing.assert_close(drawn.std((0, 1)), attn.log_deviation[0].exp(), atol=0.0, rtol=0.1)
    torch.manual_seed(3)
    first = attn(None, streams()[1][:, :1] * 0)
    torch.manual_seed(3)
    torch.testing.assert_close(attn(None, streams()[1][:, :1] * 0), first)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("compete", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_read_does_the_last_round_with_a_given_matrix(heads, compete, padded):
    attn, (x, z) = made(heads=heads, compete=compete), streams()
    mask = torch.arange(INPUTS) < torch.tensor([[INPUTS], [5]]) if padded else None
    weights = attn.weights(x, z, mask=mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, 4, dtype=torch.float64))
    torch.testing.assert_close(attn.read(weights, x, z, mask=mask), attn(x, z, mask=mask))
    assert (attn.read(weights.roll(1, 2), x, z, mask=mask) - attn(x, z, mask=mask)).abs().max() > 1e-6


def test_without_competition_it_is_softmax_over_the_inputs():
    attn, (x, z) = made(iterations=1, compete=False), streams()
    q, k = attn.q(attn.norm_slots(x)), attn.k(attn.norm_context(z))
    torch.testing.assert_close(attn.weights(x, z)[:, 0], (q @ k.mT / DIM**0.5).softmax(-1))


def test_bad_options_are_refused():
    for name in ("slots", "iterations", "heads"):
        with pytest.raises(CrosslightError, match=f"{name}: got 0"):
            made(**{name: 0})
