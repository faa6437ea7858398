"""The generator against arrays of the authors' generator (HazyResearch/zoology, multiquery_ar), and the task."""

import pytest
import torch

import crosslight
from crosslight.errors import CrosslightError
from crosslight.tasks.zoology_mqar import CARD, IGNORE, BaseConv, ZoologyMQAR, generate

# multiquery_ar(vocab_size=32, num_examples=3, input_seq_len=16, seed=7, num_kv_pairs=3, random_non_queries=False)
INPUTS = [
    [9, 18, 6, 24, 11, 27, 0, 0, 9, 0, 6, 0, 0, 0, 11, 0],
    [13, 16, 6, 18, 2, 22, 6, 0, 0, 0, 13, 0, 2, 0, 0, 0],
    [10, 26, 13, 22, 11, 25, 10, 0, 0, 0, 0, 0, 11, 0, 13, 0],
]
LABELS = [{8: 18, 10: 24, 14: 27}, {6: 18, 10: 16, 12: 22}, {6: 26, 12: 25, 14: 22}]


def test_layout_of_the_authors_for_the_same_seed():
    inputs, labels = generate(3, 16, vocab=32, pairs=3, seed=7, fill=False)
    assert inputs.tolist() == INPUTS
    assert [{i: v for i, v in enumerate(row) if v != IGNORE} for row in labels.tolist()] == LABELS
    filled, same = generate(3, 16, vocab=32, pairs=3, seed=7)
    assert torch.equal(labels, same)
    kept = inputs != 0
    assert torch.equal(filled[kept], inputs[kept])
    assert filled[~kept].unique().numel() > 5


def test_every_label_is_the_value_of_its_key():
    inputs, labels = generate(1000, 64, vocab=512, pairs=8, seed=1)
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        table = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(table) == 8
        assert all(1 <= k < 256 <= v < 512 for k, v in table.items())
        asked = [i for i, v in enumerate(answers) if v != IGNORE]
        assert len(asked) == 8
        assert all(i >= 16 and i % 2 == 0 and answers[i] == table[row[i]] for i in asked)


def test_seeded():
    a, b, c = (generate(5, 32, vocab=64, pairs=4, seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_distances_follow_the_power_law():
    """With a = 0.01 half of the queries stand in the first fifth of the slots; with a = 1 a fifth does."""
    for power, low, high in ((0.01, 0.4, 0.8), (1.0, 0.15, 0.25)):
        _, labels = generate(2000, 128, vocab=256, pairs=2, power=power, seed=0)
        slots = ((labels != IGNORE).nonzero()[:, 1] - 4) // 2
        assert low < (slots < 12).float().mean() < high


def test_bad_sizes():
    for options, match in [
        ({"length": 15}, "length: got 15"),
        ({"pairs": 5}, "pairs: got 5, expected 1 to length / 4 = 4"),
        ({"vocab": 16}, "vocab: got 16"),
    ]:
        with pytest.raises(CrosslightError, match=match):
            generate(2, **{"length": 16, "vocab": 32, "pairs": 2, **options})


def test_base_conv_is_the_equation():
    torch.manual_seed(0)
    layer, u = BaseConv(4, kernel=3).double(), torch.randn(2, 6, 4, dtype=torch.double)
    w, b1, h, b2 = layer.gate.weight, layer.gate.bias, layer.conv.weight[:, 0], layer.conv.bias
    padded = torch.cat([torch.zeros(2, 2, 4, dtype=torch.double), u], 1)
    conv = torch.stack([(padded[:, t : t + 3] * h.T).sum(1) for t in range(6)], 1)
    torch.testing.assert_close(layer(u), (u @ w.T + b1) * (conv + b2))


def test_it_is_a_row_that_prints_itself_and_makes_the_task():
    task = crosslight.create("zoology-mqar", length=32, pairs=2, vocab=64)
    assert isinstance(task, ZoologyMQAR)
    assert crosslight.card("zoology-mqar") == CARD
    with pytest.raises(CrosslightError, match="options of 'zoology-mqar'"):
        crosslight.create("zoology-mqar", width=3)


def test_perfect_recall_scores_one():
    """A model that looks the answer up gets accuracy 1, one that always says the last value about 1 / pairs."""
    task = ZoologyMQAR(length=32, pairs=2, vocab=64)

    class Lookup(torch.nn.Module):
        def __init__(self, exact):
            super().__init__()
            self.exact, self.none = exact, torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            answers = torch.zeros(*tokens.shape, 64)
            for row, out in zip(tokens.tolist(), answers, strict=True):
                table = dict(zip(row[0:4:2], row[1:4:2], strict=True))
                for i, token in enumerate(row):
                    out[i, table.get(token, 0) if self.exact else row[3]] = 1
            return answers

    assert task.evaluate(Lookup(True))["accuracy"] == 1.0
    assert 0.3 < task.evaluate(Lookup(False))["accuracy"] < 0.7
