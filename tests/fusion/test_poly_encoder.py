"""The equations as loops, the bi-encoder at m = 1, and what a pair costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import crosslight
from crosslight.errors import CrosslightError
from crosslight.fusion.poly_encoder import PolyEncoder

STREAMS = {"context": 8, "candidate": 8}


def scored_by_loops(block, context, candidates):
    """(contexts, candidates): every pair on its own."""
    table = torch.zeros(len(context), len(candidates))
    for b, h in enumerate(context):
        ys = []
        for code in block.codes:
            w = torch.stack([code @ state for state in h]).softmax(0)
            ys.append(sum(weight * state for weight, state in zip(w, h, strict=True)))
        for c, y in enumerate(candidates):
            u = torch.stack([y @ feature for feature in ys]).softmax(0)
            table[b, c] = sum(weight * feature for weight, feature in zip(u, ys, strict=True)) @ y
    return table


def test_all_pairs_by_one_einsum_equal_the_loop():
    block = PolyEncoder(STREAMS, codes=5)
    context, candidates = torch.randn(3, 6, 8), torch.randn(4, 8)
    features, keep = block.features(context)
    scores = block.score(features, candidates, keep)
    torch.testing.assert_close(scores, scored_by_loops(block, context, candidates))
    # The block's output is the context as each candidate sees it; its dot product with the candidate is the score.
    own = candidates.expand(3, -1, -1)
    seen = block({"context": context, "candidate": own})["context"]
    torch.testing.assert_close((seen * own).sum(-1), scores)
    torch.testing.assert_close(block.score(features, own), scores)


def test_one_code_is_a_bi_encoder():
    block = PolyEncoder(STREAMS, codes=1)
    context, candidates = torch.randn(3, 6, 8), torch.randn(4, 8)
    pooled = ((context @ block.codes[0]).softmax(1).unsqueeze(-1) * context).sum(1)
    torch.testing.assert_close(block.score(block.features(context)[0], candidates), pooled @ candidates.T)
    first = PolyEncoder(STREAMS, codes=1, source="first")
    torch.testing.assert_close(first.score(first.features(context)[0], candidates), context[:, 0] @ candidates.T)


def test_order_of_the_codes_does_not_matter():
    block = PolyEncoder(STREAMS, codes=5)
    context, candidates = torch.randn(3, 6, 8), torch.randn(4, 8)
    before = block.score(block.features(context)[0], candidates)
    with torch.no_grad():
        block.codes.copy_(block.codes[torch.randperm(5)])
    torch.testing.assert_close(block.score(block.features(context)[0], candidates), before)


@pytest.mark.parametrize("source", ["learned", "first", "last"])
def test_padding_changes_nothing(source):
    block = PolyEncoder(STREAMS, codes=3, source=source)
    context, candidates = torch.randn(2, 5, 8), torch.randn(4, 8)
    expected = block.score(*_in_order(block.features(context), candidates))
    for left in (0, 2):  # padding on the right, then on both sides
        padded, mask = 9 * torch.ones(2, 9, 8), torch.zeros(2, 9, dtype=torch.bool)
        padded[:, left : left + 5], mask[:, left : left + 5] = context, True
        torch.testing.assert_close(block.score(*_in_order(block.features(padded, mask), candidates)), expected)
    short = torch.zeros(2, 9, dtype=torch.bool)
    short[:, 4:6] = True  # fewer tokens than codes
    padded[:, 4:6] = context[:, :2]
    torch.testing.assert_close(
        block.score(*_in_order(block.features(padded, short), candidates)),
        block.score(*_in_order(block.features(context[:, :2]), candidates)),
    )


def _in_order(features, candidates):
    return features[0], candidates, features[1]


def test_first_and_last_are_the_hidden_states():
    context = torch.randn(2, 6, 8)
    for source, expected in (("first", context[:, :3]), ("last", context[:, -3:])):
        block = PolyEncoder(STREAMS, codes=3, source=source)
        assert torch.equal(block.features(context)[0], expected)
        assert not list(block.parameters())


def test_a_pair_costs_the_same_however_long_the_context_is():
    block, candidates = PolyEncoder(STREAMS, codes=4), torch.randn(50, 8)
    costs = []
    for n in (10, 1000):
        features, _ = block.features(torch.randn(1, n, 8))
        with FlopCounterMode(display=False) as counter:
            block.score(features, candidates)
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1] == 2 * 50 * 4 * 8


def test_loss_takes_the_other_candidates_as_negatives():
    scores = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    expected = -(scores[0].log_softmax(0)[0] + scores[1].log_softmax(0)[1]) / 2
    torch.testing.assert_close(PolyEncoder.loss(scores), expected)


def test_one_candidate_may_come_without_its_axis():
    block, streams = PolyEncoder.sample()
    one = {**streams, "candidate": streams["candidate"][:, 1]}
    torch.testing.assert_close(block(one)["context"], block(streams)["context"][:, 1:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": {"context": 8, "candidate": 16}}, r"streams\['candidate'\]: got 16, expected 8, the width"),
        ({"streams": {"a": 8, "b": 8, "c": 8}}, "streams: got a, b, c, expected two"),
        ({"streams": STREAMS, "codes": 0}, "codes: got 0"),
        ({"streams": STREAMS, "source": "middle"}, "source: got 'middle'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(CrosslightError, match=message):
        crosslight.create("poly-encoder", **options)
