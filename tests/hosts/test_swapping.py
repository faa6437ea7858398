"""Cores with parameters and limits, and mechanisms that are whole layers, in other models' places."""

import copy

import host_models as models
import pytest
import torch
from torch import nn

import crosslight
from crosslight import registry
from crosslight.attention.base import AttentionLayer, Core
from crosslight.attention.softmax import CARD, Softmax
from crosslight.cards import Card
from crosslight.errors import CrosslightError, UnsupportedPattern


def card(id, **fields):
    given = {"kind": "token", "group": "test", "title": id, "year": 2026, "paper": "none", "summary": "For tests."}
    return Card(id=id, **{**given, "patterns": CARD.patterns, **fields})


class Tempered(Softmax):
    """Softmax with a learned temperature per head."""

    card = card("tempered")

    def __init__(self, heads, head_dim, start=1.0):
        super().__init__(heads, head_dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), start))

    def forward(self, q, k, v, **how):
        return super().forward(q * self.temperature, k, v, **how)

    def weights(self, q, k, **how):
        return super().weights(q * self.temperature, k, **how)


class KeysOnly(Core):
    """Weights that are the same for every query; takes key padding and the causal flag only."""

    card = card("keys-only", mask="keys")

    def weights(self, q, k, *, mask=None, causal=False):
        scores = k[..., :1].transpose(-1, -2).expand(-1, -1, q.shape[2], -1)
        return Softmax(self.heads, 1).weights(
            torch.ones_like(q[..., :1]), scores[:, :, 0, :, None], mask=mask, causal=causal
        )

    def forward(self, q, k, v, *, mask=None, causal=False):
        return self.weights(q, k, mask=mask, causal=causal) @ v


class NonCausal(Softmax):
    card = card("non-causal", patterns=("noncausal-self", "noncausal-cross"), why_not="It reads both ways.")


class Whole(AttentionLayer):
    """Plain attention as a layer with its own projections."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__(Softmax(heads, dim // heads), dim, context_dim=context_dim)


class NotLinear(Softmax):
    card = card("not-linear", linear_in_values=False)

    def forward(self, q, k, v, **how):
        return super().forward(q, k, v, **how).tanh()


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    entries = {c.card.id: (c.card, c, {}) for c in (Tempered, KeysOnly, NonCausal, NotLinear)}
    entries["whole"] = (card("whole"), Whole, {})
    for id, entry in entries.items():  # in the registry itself, where rows that load meanwhile stay
        monkeypatch.setitem(registry._registered, id, entry)


SOME = ["bert", "t5", "timm_vit", "unet", "sd3", "torch_transformer", "own", "handwritten"]


@pytest.mark.parametrize("name", SOME)
def test_parameters_live_on_the_model(name):
    model, inputs = models.make(name)
    plain = models.run(model, inputs).detach()
    names, values = set(model.state_dict()), copy.deepcopy(model.state_dict())
    handle = crosslight.swap(model, "tempered")
    added = set(model.state_dict()) - names
    assert len(added) == len(handle.sites)
    assert all("core.temperature" in n for n in added)
    torch.testing.assert_close(models.run(model, inputs), plain, rtol=1e-5, atol=1e-5)

    # They train; the loss needs them all.
    parameters = dict(model.named_parameters())
    (models.run(model, inputs) * torch.randn_like(plain)).sum().backward()
    assert all(parameters[n].grad is not None for n in added)
    torch.optim.SGD([parameters[n] for n in added], lr=10.0).step()
    with torch.no_grad():
        trained = models.run(model, inputs)
        if name not in ("torch_transformer", "unet", "t5"):  # where a row's maps hardly matter at this size
            assert not torch.allclose(trained, plain, atol=1e-6)

        # They are saved: into another swapped model.
        other, _ = models.make(name)
        crosslight.swap(other, "tempered")
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(models.run(other, inputs), trained)

        # They move.
        model.double()
        assert all(p.dtype == torch.float64 for p in model.parameters())
        model.float()

        handle.restore()
        handle.restore()
        assert set(model.state_dict()) == names
        model.load_state_dict(values)
        torch.testing.assert_close(models.run(model, inputs), plain)


@torch.no_grad()
def test_options_and_half_precision():
    model, inputs = models.make("bert")
    model.bfloat16()
    with crosslight.swap(model, "tempered", start=2.0) as handle, crosslight.watch(model) as seen:
        models.run(model, inputs)
        assert handle.sites[0].module.crosslight_core.temperature.dtype == torch.bfloat16
    with crosslight.watch(model) as plain:
        models.run(model, inputs)
    first = seen.sites[0].name
    assert (seen[first].amax(-1) >= plain[first].amax(-1) - 1e-2).all()  # colder rows are sharper
    assert not torch.allclose(seen[first], plain[first])
    with pytest.raises(CrosslightError, match="options of 'tempered': got warmth, expected some of start"):
        crosslight.swap(model, "tempered", warmth=1)


@torch.no_grad()
def test_what_a_row_has_around_its_core():
    """Its layer's biases are the host's matter; what else the layer does is missed; single keys need projections."""
    model, inputs = models.make("bert")
    with pytest.warns(UserWarning, match="lightning-attention comes without the layer.*norm and gate"):
        handle = crosslight.swap(model, "lightning-attention")
    models.run(model, inputs)
    handle.restore()
    with pytest.raises(CrosslightError, match="mqa is a whole layer with projections of its own"):
        crosslight.swap(model, "mqa")
    with pytest.raises(CrosslightError, match=r"where: got \['\*0\*'\], expected a glob on module paths or a function"):
        crosslight.swap(model, "softmax", where=["*0*"])
    model, inputs = models.make("timm_vit")
    with crosslight.swap(model, "mqa") as handle:
        models.run(model, inputs)
    assert handle.sites


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_reach_a_core_in_its_own_words(name, implementation):
    """Key padding and the causal flag are recognised in the matrices that the host makes."""
    model, inputs = models.make(name)
    model.set_attn_implementation(implementation)
    with crosslight.swap(model, "keys-only"), crosslight.watch(model) as seen:
        models.run(model, inputs)
    keep = inputs["attention_mask"].bool()
    for name, map in seen:
        if map.shape[-1] == keep.shape[1]:
            assert (map.permute(0, 3, 1, 2)[~keep] == 0).all(), name
        if name.startswith(("model.", "decoder.")) and "encoder_attn" not in name:
            assert (map.triu(1) == 0).all(), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("id", "options"),
    [
        ("agent-attention", {"agents": 2}),
        ("biformer-bra", {"regions": 2, "top_k": 1}),
        ("mta", {"norm": False, "gate": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:swap")
def test_padded_queries_reach_no_other_token(id, options):
    """Nor do they in our own layer around another core."""

    def moved(model):  # off what starts as the identity
        for name, p in model.named_parameters():
            if "core." in name:
                p.add_(0.3 * torch.randn_like(p))

    model, inputs = models.make("bert")
    keep = inputs["attention_mask"].flip(1).bool()  # padding comes first: some cores look back only
    with crosslight.swap(model, id, **options):
        moved(model)
        y = model(inputs["input_ids"], keep.long()).last_hidden_state
        other = model(inputs["input_ids"].where(keep, 45), keep.long()).last_hidden_state
    torch.testing.assert_close(other[keep], y[keep])
    assert not torch.allclose(other[~keep], y[~keep])
    around, x = nn.Sequential(crosslight.create("softmax", dim=16, heads=2)), torch.randn(2, 7, 16)
    with crosslight.swap(around, id, **options):
        moved(around)
        changed = torch.where(keep[..., None], x, 9 * x)
        torch.testing.assert_close(around[0](changed, mask=keep)[keep], around[0](x, mask=keep)[keep])


@torch.no_grad()
def test_generation_with_a_core_that_takes_flags():
    model, _ = models.make("llama")
    inputs = {"input_ids": models.IDS}
    with crosslight.swap(model, "keys-only"):
        stepwise = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        whole = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(stepwise, whole)


@torch.no_grad()
def test_clear_errors():
    model, inputs = models.make("llama_flag")
    with (
        crosslight.swap(model, "non-causal"),
        pytest.raises(UnsupportedPattern, match=r"non-causal has no causal-self.*It reads both ways"),
    ):
        models.run(model, inputs)
    model, inputs = models.make("t5")
    with crosslight.swap(model, "keys-only"), pytest.raises(CrosslightError, match="adds position biases"):
        models.run(model, inputs)
    model, inputs = models.make("bert")
    before = set(dict(model.named_modules()))
    with pytest.raises(CrosslightError, match=r"whole is a whole layer.*expected a mechanism that is a core"):
        crosslight.swap(model, "whole")
    assert set(dict(model.named_modules())) == before
    with pytest.raises(CrosslightError, match="expected a registered id"):
        crosslight.swap(model, "softmix")


@torch.no_grad()
def test_not_linear_in_values():
    """Such a core can be watched, and its output is its own; steering it has no meaning."""
    model, inputs = models.make("bert")
    with crosslight.swap(model, "not-linear"):
        plain = models.run(model, inputs)
        with crosslight.watch(model) as seen:
            assert torch.equal(models.run(model, inputs), plain)
        assert len(seen) == 2
        with pytest.raises(CrosslightError, match="not linear in its values"), crosslight.steer(model, lambda a, c: a):
            models.run(model, inputs)


@pytest.mark.parametrize("name", ["timm_vit", "torch_transformer", "own"])
@torch.no_grad()
def test_whole_layers_take_the_hosts_weights(name):
    model, inputs = models.make(name)
    if name == "own":
        model.first.position = None  # the layer that is put in has no positions
        model.cross = crosslight.create("softmax", dim=16, heads=2, context_dim=12)
    plain, names = models.run(model, inputs), set(model.state_dict())
    with crosslight.swap(model, "whole") as handle:
        torch.testing.assert_close(models.run(model, inputs), plain, rtol=1e-5, atol=1e-5)
        with crosslight.watch(model) as seen:
            models.run(model, inputs)
        assert len(seen.sites) == len(handle.sites)
    assert set(model.state_dict()) == names
    assert torch.equal(models.run(model, inputs), plain)


@torch.no_grad()
def test_a_whole_layer_answers_like_multihead_attention():
    for first in (True, False):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2, batch_first=first)}).eval()
        q, k = (torch.randn((2, n, 16) if first else (n, 2, 16)) for n in (4, 5))
        padding = torch.tensor([[False] * 5, [False, True, False, False, True]])
        mask = torch.rand(4, 5) > 0.7
        mask[:, 0] = False
        given = {"key_padding_mask": padding, "attn_mask": mask}
        plain = model["a"](q, k, k, **given)
        with crosslight.swap(model, "whole"):
            torch.testing.assert_close(model["a"](q, k, k, **given), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_swaps_nest():
    model, inputs = models.make("timm_vit")
    plain = models.run(model, inputs)
    with crosslight.swap(model, "tempered", start=3.0):
        outer = models.run(model, inputs)
        with crosslight.swap(model, "softmax", where="blocks.0.*"):
            inner = models.run(model, inputs)
        assert torch.equal(models.run(model, inputs), outer)
    assert torch.equal(models.run(model, inputs), plain)
    assert not torch.allclose(inner, outer)
    assert not torch.allclose(inner, plain)


@torch.no_grad()
def test_own_layers_keep_their_projections():
    layer = crosslight.create("softmax", dim=16, heads=2, position="rope")
    x = torch.randn(2, 5, 16)
    plain = layer(x, causal=True)
    with crosslight.swap(layer, "tempered"):
        torch.testing.assert_close(layer(x, causal=True), plain)
        assert layer.core.card.id == "tempered"
    assert layer.core.card.id == "softmax"
    layer = crosslight.create("softmax", dim=16, heads=2, position="alibi")
    with pytest.raises(CrosslightError, match="position is a bias"):
        crosslight.swap(layer, "keys-only")


@torch.no_grad()
def test_steps_of_own_layers_are_seen():
    layer = crosslight.create("softmax", dim=16, heads=2)
    x = torch.randn(2, 5, 16)
    with crosslight.watch(layer) as seen:
        full, cache = layer(x, causal=True), None
        for t in range(5):
            y, cache = layer.step(x[:, t : t + 1], cache)
    torch.testing.assert_close(y[:, 0], full[:, -1])
    whole, *steps = seen.maps[""]
    for t, row in enumerate(steps):
        torch.testing.assert_close(row[:, :, 0], whole[:, :, t, : t + 1])
