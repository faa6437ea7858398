"""Cores in models that decode from a cache of keys and values: each step is that of a pass without a cache."""

from contextlib import nullcontext

import host_models as models
import pytest
import torch
from torch import nn

import crosslight
from crosslight import registry
from crosslight.errors import CrosslightError
from crosslight.hosts.swapping import is_core

pytestmark = pytest.mark.filterwarnings("ignore:swap")

IDS = torch.tensor([[7, 12, 30, 4, 9, 21, 40, 3, 18, 26, 44], [5, 8, 3, 17, 33, 20, 11, 45, 6, 29, 13]])
#: Their rows depend on earlier queries, which no cache of a host holds.
NEED_QUERIES = {"davit", "mta", "xcit"}


CORES = [c.id for c in registry.find(kind="token", pattern="causal-self") if is_core(*registry.factory(c.id))]


def swapped(id, host="llama", **options):
    """A model whose core is moved off what it starts as, often the identity."""
    model, _ = models.make(host)
    model.double()
    crosslight.swap(model, id, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "crosslight_core" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def whole_and_stepwise(model, ends, padded=0, **cache):
    """Logits of the tokens that are no padding: in one pass, and in calls that end at ``ends``."""
    keep = torch.ones_like(IDS)
    keep[0, :padded] = 0
    place = (keep.cumsum(1) - 1).clamp(min=0)
    whole = model(IDS, attention_mask=keep, position_ids=place, use_cache=False).logits
    parts, start = [], 0
    for end in ends:
        given = {"attention_mask": keep[:, :end], "position_ids": place[:, start:end], "use_cache": True}
        made = model(IDS[:, start:end], **given, **cache)
        cache, start = {"past_key_values": made.past_key_values}, end
        parts.append(made.logits)
    seen = keep[:, :end].bool()
    return whole[:, :end][seen], torch.cat(parts, 1)[seen]


@pytest.mark.parametrize("id", CORES)
@torch.no_grad()
def test_cached_steps_equal_the_whole_pass(id):
    model = swapped(id, **registry.card(id).small)
    if id in NEED_QUERIES:
        with pytest.raises(CrosslightError, match=f"cached keys for {id}, which needs.*expected use_cache=False"):
            whole_and_stepwise(model, (7, 8))
    else:
        whole, stepwise = whole_and_stepwise(model, (7, 8, 9, 10))
        torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("id", ["softmax", "lightning-attention", "lln-attention", "moba", "halonet"])
@pytest.mark.parametrize("ends", [(6, 7, 8, 9), (5, 8, 11), (1, 2, 3, 7)])
@torch.no_grad()
def test_padding_on_the_left_and_several_tokens_at_once(id, ends):
    model = swapped(id, **registry.card(id).small)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        whole, stepwise = whole_and_stepwise(model, ends, padded=3 if ends[0] > 3 else 0)
        torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("id", ["softmax", "lightning-attention", "landmark-attention"])
@torch.no_grad()
def test_a_cache_of_fixed_size(id):
    """It hands over keys that are not there yet, behind a mask."""
    from transformers import StaticCache

    model = swapped(id)
    cache = StaticCache(config=model.config, max_cache_len=16)
    whole, stepwise = whole_and_stepwise(model, (6, 7, 8, 10), padded=2, past_key_values=cache)
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-8)


@torch.no_grad()
def test_summaries_that_need_earlier_queries():
    """A core that needs none of them yet goes on; then it says so."""
    model = swapped("combiner", block_size=6, pool="mean")
    whole, stepwise = whole_and_stepwise(model, (4, 5, 6))
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-8)
    with pytest.raises(CrosslightError, match="cached keys for combiner"):
        whole_and_stepwise(model, (6, 7))


@pytest.mark.parametrize(("id", "right"), [("softmax", True), ("lightning-attention", False), ("halonet", False)])
@torch.no_grad()
def test_a_cache_that_forgets(id, right):
    t = pytest.importorskip("transformers")
    model = t.MistralForCausalLM(t.MistralConfig(**models.TEXT, num_key_value_heads=1, sliding_window=6)).eval()
    plain = model(IDS).logits
    refused = pytest.raises(CrosslightError, match=f"cached keys for {id} from a cache that drops.*window of 6")
    with crosslight.swap(model, id), nullcontext() if right else refused:
        cache, parts = t.DynamicCache(config=model.config), []
        for token in IDS.split(1, 1):
            made = model(token, past_key_values=cache, use_cache=True)
            parts.append(made.logits)
            cache = made.past_key_values
        torch.testing.assert_close(torch.cat(parts, 1), plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_cached_steps_are_seen_and_steered():
    model = swapped("lln-attention")
    site = "model.layers.0.self_attn"
    with crosslight.watch(model) as seen:
        whole, stepwise = whole_and_stepwise(model, (7, 8))
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-8)
    full, _, step = seen.maps[site]
    assert step.shape == (2, 2, 1, 8)
    torch.testing.assert_close(step[:, :, 0], full[:, :, 7, :8])
    with crosslight.steer(model, lambda a, call: 0.5 * a):
        halved, stepwise = whole_and_stepwise(model, (7, 8))
    torch.testing.assert_close(stepwise, halved, rtol=0, atol=1e-8)
    assert not torch.allclose(halved, whole)


def test_in_training():
    """Gradients reach what is cached, unknown queries give no NaN, and running statistics stay."""
    model = swapped("lln-attention")
    core = model.train().model.layers[0].self_attn.crosslight_core
    cache = model(IDS[:, :5], use_cache=True).past_key_values
    assert int(core.batches) == 1
    model(IDS[:, 5:6], past_key_values=cache).logits.square().sum().backward()
    assert core.training
    assert int(core.batches) == 1
    gradient = model.model.embed_tokens.weight.grad
    assert gradient.isfinite().all()
    assert gradient[IDS[0, 2]].abs().max() > 0


class Caching(nn.Module):
    """Hand-written attention with a cache."""

    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd, self.cache = 2, 16, None
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        first = self.cache is None
        if not first:
            k, v = (torch.cat([a, b], 2) for a, b in zip(self.cache, (k, v), strict=True))
        self.cache = k, v
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=first)
        return self.out(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_handwritten_cache():
    model, x = nn.Sequential(Caching()).eval(), torch.randn(2, 9, 16)
    with crosslight.swap(model, "lightning-attention"):
        whole, model[0].cache = model(x), None
        stepwise = torch.cat([model(part) for part in x.split([6, 1, 1, 1], 1)], 1)
    torch.testing.assert_close(stepwise, whole)


@torch.no_grad()
def test_a_core_that_needs_its_layer():
    model, _ = models.make("llama")
    with pytest.raises(CrosslightError, match="superlinear-attention is a whole layer.*expected a mechanism that is"):
        crosslight.swap(model, "superlinear-attention")
    around = nn.Sequential(crosslight.create("softmax", dim=16, heads=2))
    with crosslight.swap(around, "superlinear-attention"):
        assert around[0](torch.randn(2, 7, 16), causal=True).shape == (2, 7, 16)


@pytest.mark.parametrize("id", ["dare-rec", "wonderful-matrices"])
@torch.no_grad()
def test_layers_whose_core_has_no_card(id):
    model, inputs = models.make("timm_vit")
    with crosslight.swap(model, id, **registry.card(id).small):
        plain = models.run(model, inputs)
        with crosslight.watch(model) as seen:
            torch.testing.assert_close(models.run(model, inputs), plain)
    assert len(seen) == 2
