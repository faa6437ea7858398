"""VAR: which rows it edits, and what it leaves alone."""

import pytest
import torch
from torch import nn

import crosslight
from crosslight.errors import CrosslightError
from crosslight.hosts import Call, Site

IMAGE = (2, 8)


def call(hidden):
    return Call(Site("layer", nn.Identity(), "self", 2, 4, "own"), hidden=hidden)


def planted(*tokens, n=10, dim=16):
    hidden = torch.randn(1, n, dim).clamp(-2, 2)
    for t in tokens:
        hidden[0, t, 3] = 60.0
    return hidden


def rule(**options):
    return crosslight.create("var-visual-sink", **{"image": IMAGE, "dims": (3,), "tau": 3.5, **options})


def random_weights(n=10):
    return torch.rand(1, 2, n, n, dtype=torch.double).softmax(-1)


def test_planted_massive_dimensions_are_found_at_any_scale():
    hidden = planted(0, 4)
    expected = torch.zeros(1, 10, dtype=torch.bool)
    expected[0, [0, 4]] = True
    for scale in (1e-3, 1.0, 1e3):
        assert torch.equal(rule().sinks(scale * hidden), expected)


def test_edited_rows_sum_to_one_and_the_budget_moves_to_the_rest_of_the_image():
    a, hidden = random_weights(), planted(0, 4)
    out = rule(p=0.6)(a, call(hidden))
    assert torch.allclose(out.sum(-1), torch.ones(1, 2, 10, dtype=torch.double), atol=1e-12)
    text = [0, 1, 8, 9]
    assert torch.allclose(out[..., text, :][..., [0, 4]], 0.6 * a[..., text, :][..., [0, 4]])
    rest = [2, 3, 5, 6, 7]
    before, after = a[..., text, :][..., rest], out[..., text, :][..., rest]
    assert (after > before).all()
    assert torch.allclose(after / after.sum(-1, keepdim=True), before / before.sum(-1, keepdim=True))
    assert torch.equal(out[..., text, :][..., [1, 8, 9]], a[..., text, :][..., [1, 8, 9]])


def test_image_queries_and_other_heads_are_bit_identical():
    a, hidden = random_weights(), planted(4)
    a[:, 1] = torch.eye(10, dtype=torch.double) * 0.9 + 0.01  # looks at itself: no image mass in text rows
    out = rule()(a, call(hidden))
    assert torch.equal(out[:, :, 2:8], a[:, :, 2:8])
    assert torch.equal(out[:, 1], a[:, 1])
    assert not torch.equal(out[:, 0], a[:, 0])


def test_rows_that_look_mostly_at_visual_sinks_are_left_alone():
    a = torch.full((1, 1, 10, 10), 0.02, dtype=torch.double)
    a[..., 4] = 0.82
    assert torch.equal(rule(rho=0.5)(a, call(planted(4))), a)
    assert not torch.equal(rule(rho=0.95)(a, call(planted(4))), a)


def test_p_one_and_no_sink_are_the_identity():
    a = random_weights()
    assert torch.allclose(rule(p=1.0)(a, call(planted(4))), a, atol=1e-15)
    assert torch.equal(rule()(a, call(planted())), a)


def test_generation_remembers_the_sinks_of_earlier_tokens():
    hidden, a = planted(0, 4), random_weights()
    whole = rule()(a, call(hidden))
    stepped = rule()
    stepped(a[..., :9, :9], call(hidden[:, :9]))
    assert torch.allclose(stepped(a[..., 9:, :], call(hidden[:, 9:])), whole[..., 9:, :])
    with pytest.raises(CrosslightError, match="the whole sequence first"):
        rule()(a[..., 9:, :], call(hidden[:, 9:]))


def test_inside_a_model_strength_zero_and_leaving_change_nothing():
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaModel(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        model.embed_tokens.weight[4, 3] = 5.0
        before = model(ids).last_hidden_state
        edit = rule(min_image_mass=0.0, rho=1.0)
        with crosslight.steer(model, edit, where=edit.where(model)):
            assert not torch.equal(model(ids).last_hidden_state, before)
        assert torch.equal(model(ids).last_hidden_state, before)
        with crosslight.steer(model, rule(strength=0.0)):
            assert torch.equal(model(ids).last_hidden_state, before)
    names = [s.name for s in crosslight.hosts.sites(model) if edit.where(model)(s)]
    assert [n.split(".")[1] for n in names] == ["2", "3"]


def test_bad_input_names_the_argument():
    with pytest.raises(CrosslightError, match="image: got"):
        crosslight.create("var-visual-sink", image=(5, 2))
    with pytest.raises(CrosslightError, match="dims: got"):
        rule(dims=(99,))(random_weights(), call(planted()))
