"""RCMHA: convolution and relative scores written out, what is left without them, and the parts in other rows."""

import math

import pytest
import torch
import torch.nn.functional as F

import crosslight
from crosslight.attention.rcmha import Distances
from crosslight.errors import CrosslightError
from crosslight.testing import flops

N, HEADS, D, REACH = 9, 2, 8, 16


def make(*, fresh: bool = False, **options):
    options = {"dim": HEADS * D, "heads": HEADS, "reach": REACH, **options}
    attn = crosslight.create("rcmha", **options).double()
    if not fresh:
        with torch.no_grad():
            for p in attn.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return attn


def stream(n: int = N) -> torch.Tensor:
    return torch.randn(2, n, HEADS * D, dtype=torch.double)


def convolved(attn, name, x):
    """Tap by tap, one time at a time."""
    t = getattr(attn, name)(x).view(*x.shape[:2], HEADS, D)
    conv = getattr(attn, f"conv_{name}").conv
    out = torch.zeros_like(t)
    for i in range(x.shape[1]):
        out[:, i] = conv.bias
        for tap in range(3):
            if i - 2 + tap >= 0:
                out[:, i] += conv.weight[:, 0, tap] * t[:, i - 2 + tap]
    return out.transpose(1, 2)


def written_out(attn, x, z):
    """Scores and values, pair by pair."""
    q, k, v = convolved(attn, "q", x), convolved(attn, "k", z), convolved(attn, "v", z)
    s = torch.zeros(2, HEADS, x.shape[1], z.shape[1], dtype=torch.double)
    for h in range(HEADS):
        for i in range(x.shape[1]):
            for j in range(z.shape[1]):
                at = min(max(j - i + REACH, 0), 2 * REACH - 1)
                relative = q[:, h, i] @ attn.keys_at[h, at] + attn.distances.table[h, at]
                s[:, h, i, j] = ((q[:, h, i] + attn.query_bias[h, 0]) * k[:, h, j]).sum(-1) + relative
    return s / math.sqrt(D), v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("m", [None, 5, 23])
def test_equals_the_scores_pair_by_pair(causal, m):
    attn, x = make(), stream()
    z = None if m is None else stream(m)
    s, v = written_out(attn, x, x if z is None else z)
    if causal and z is None:
        s = s.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)
    torch.testing.assert_close(attn.weights(x, z, causal=causal), s.softmax(-1))
    y = attn.out((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, z, causal=causal), y)


def test_with_an_identity_tap_and_tables_of_zero_it_is_multi_head_attention():
    attn, x = make(fresh=True), stream()
    with torch.no_grad():
        for conv in (attn.conv_q.conv, attn.conv_k.conv, attn.conv_v.conv):
            conv.weight.zero_()[:, 0, 2] = 1
            conv.bias.zero_()
    q, k, v = (p(x).view(2, N, HEADS, D).transpose(1, 2) for p in (attn.q, attn.k, attn.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attn(x, causal=True), attn.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("n", "m", "offset"), [(1, 1, 0), (5, 5, 0), (3, 8, 0), (8, 3, 0), (2, 7, 5), (1, 12, 11)])
def test_the_shift_puts_each_distance_in_its_place(n, m, offset):
    attn, q = make(), torch.randn(1, HEADS, n, D, dtype=torch.double)
    s = attn.relative(q, m, offset)
    for i in range(n):
        for j in range(m):
            at = j - i - offset + REACH
            expected = (q[0, :, i] * attn.keys_at[:, at]).sum(-1) + attn.distances.table[:, at]
            torch.testing.assert_close(s[0, :, i, j], expected / math.sqrt(D))


def test_only_the_distance_counts():
    attn, q = make(), torch.randn(1, HEADS, 4, D, dtype=torch.double)
    torch.testing.assert_close(attn.relative(q, 4), attn.relative(q, 7, 3)[..., 3:])


def test_the_convolution_does_not_look_ahead():
    attn, x = make(), stream()
    later = x.clone()
    later[:, 5:] = torch.randn(2, N - 5, HEADS * D)
    torch.testing.assert_close(attn(later, causal=True)[:, :5], attn(x, causal=True)[:, :5])


def test_padding_is_zero_to_the_convolution():
    attn, x = make(), stream()
    keep = torch.ones(2, N, dtype=torch.bool)
    keep[:, 0] = False  # padding on the left: what follows is as at the start of a sequence
    torch.testing.assert_close(attn(x, mask=keep, causal=True)[:, 1:], attn(x[:, 1:], causal=True))


def test_far_distances_take_the_last_entry():
    attn, x = make(), stream(3 * REACH)
    s, _ = written_out(attn, x, x)
    torch.testing.assert_close(attn.weights(x), s.softmax(-1))


def test_many_rows_are_taken_in_parts(monkeypatch):
    from crosslight.engines import dense

    attn, x = make(), stream()
    full = attn(x, causal=True), attn(x)
    monkeypatch.setattr(dense, "CHUNK", 2 * HEADS * N * 2)
    torch.testing.assert_close((attn(x, causal=True), attn(x)), full)


def test_no_tensor_for_each_pair_and_channel():
    n = 128
    attn = crosslight.create("rcmha", dim=HEADS * D, heads=HEADS, reach=REACH)
    meter = flops.measure(lambda: attn(torch.randn(1, n, HEADS * D)))
    assert meter.largest <= HEADS * n * 2 * n


@pytest.mark.parametrize("row", ["softmax", "sigmoid-attention"])
def test_the_numbers_are_a_bias_of_any_row(row):
    bias = Distances(HEADS, 4)
    with torch.no_grad():
        bias.table.normal_()
    attn = crosslight.create(row, dim=HEADS * D, heads=HEADS, position=bias).double()
    plain = crosslight.create(row, dim=HEADS * D, heads=HEADS).double()
    plain.load_state_dict({name: t for name, t in attn.state_dict().items() if "position" not in name})
    x = stream()
    matrix = torch.tensor([[[min(max(j - i + 4, 0), 7) for j in range(N)] for i in range(N)]])
    q, k, v = plain._heads(x, x, plain._checked(x, None, None, False, None)[2])
    y = plain.core(q, k, v, bias=bias.table[:, matrix[0]].unsqueeze(0))
    torch.testing.assert_close(attn(x), plain._merge(y, x))
    assert (attn(x) - plain(x)).abs().max() > 1e-3


def test_bad_options_are_refused():
    with pytest.raises(CrosslightError, match="kernel: got 0"):
        make(kernel=0)
    with pytest.raises(CrosslightError, match="reach: got 0"):
        make(reach=0)
