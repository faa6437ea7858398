import copy

import host_models as models
import pytest
import torch
from torch import nn

import crosslight
from crosslight import hosts
from crosslight.errors import CrosslightError

HOSTS = list(models.ALL)
SWAPPABLE = [h for h in HOSTS if h != "lxmert"]
#: Number of sites, and of those that read another stream.
SITES = {
    "bert": (2, 0, 0),
    "llama": (2, 0, 0),
    "bart": (6, 2, 0),
    "t5": (6, 2, 0),
    "clip": (4, 0, 0),
    "lxmert": (10, 2, 0),
    "timm_vit": (2, 0, 0),
    "timm_swin": (2, 0, 0),
    "sd3": (2, 0, 2),
    "torch_transformer": (6, 2, 0),
    "own": (2, 1, 0),
    "handwritten": (2, 0, 0),
}


def state_of(model):
    """Everything a host could have been changed in."""
    return {
        name: (
            {k: v for k, v in module.__dict__.items() if not k.startswith("_")} | dict(module._modules),
            dict(module._forward_pre_hooks),
            dict(module._forward_hooks),
            module.__dict__.get("_crosslight"),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def half(weights, call):
    """Mixes every row with the mean over its keys that can be read."""
    flat = (weights > 0).to(weights.dtype)
    return 0.5 * weights + 0.5 * flat / flat.sum(-1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("name", SITES)
def test_sites(name):
    model, _ = models.make(name)
    sites = hosts.sites(model)
    streams = [s.stream for s in sites]
    assert (len(sites), streams.count("cross"), streams.count("joint")) == SITES[name]
    assert all(s.heads == 2 and s.head_dim == 8 and model.get_submodule(s.name) is s.module for s in sites)


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_watch(name):
    model, inputs = models.make(name)
    before, plain = state_of(model), models.run(model, inputs)
    with crosslight.watch(model) as seen:
        watched = models.run(model, inputs)
    torch.testing.assert_close(watched, plain, rtol=1e-5, atol=1e-5)
    assert set(seen.maps) == {s.name for s in seen.sites}
    for _, map in seen:
        assert map.shape[1] == 2 or name == "unet"
        rows = map.sum(-1)
        filled = rows > 0 if name == "llama" else torch.ones_like(rows, dtype=torch.bool)  # llama: padding on the left
        torch.testing.assert_close(rows[filled], torch.ones_like(rows[filled]), rtol=0, atol=1e-5)
    assert state_of(model) == before
    assert torch.equal(models.run(model, inputs), plain)


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_steer(name):
    model, inputs = models.make(name)
    before, plain = state_of(model), models.run(model, inputs)
    with crosslight.steer(model, half), crosslight.watch(model) as seen:
        steered = models.run(model, inputs)
    assert (steered - plain).abs().max() > 1e-3 * plain.abs().max()
    # What was seen is what was used: the least weight is a half share.
    for _, map in seen:
        assert (map[map > 0] >= 0.5 / map.shape[-1] - 1e-6).all()
    assert state_of(model) == before
    assert torch.equal(models.run(model, inputs), plain)


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_strength_zero_is_not_asked(name):
    class Never:
        strength = 0.0

        def __call__(self, weights, call):
            raise AssertionError("asked")

    model, inputs = models.make(name)
    plain = models.run(model, inputs)
    with crosslight.steer(model, Never()):
        steered = models.run(model, inputs)
    # Bit for bit, unless PyTorch's fused encoder computed the plain output.
    assert torch.equal(steered, plain) or name == "torch_transformer"
    torch.testing.assert_close(steered, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SWAPPABLE)
@torch.no_grad()
def test_swap_softmax(name):
    model, inputs = models.make(name)
    before, plain, keys = state_of(model), models.run(model, inputs), set(model.state_dict())
    with crosslight.swap(model, "softmax"):
        swapped = models.run(model, inputs)
        assert set(model.state_dict()) == keys  # its core has no parameters
        with crosslight.watch(model) as seen:
            assert torch.allclose(models.run(model, inputs), swapped, atol=1e-5)
        assert len(seen) > 0
    torch.testing.assert_close(swapped, plain, rtol=1e-5, atol=1e-5)
    assert state_of(model) == before
    assert torch.equal(models.run(model, inputs), plain)


@pytest.mark.parametrize("name", HOSTS)
def test_gradients_of_maps(name):
    model, inputs = models.make(name)
    for p in model.parameters():
        p.requires_grad_(False)
    with crosslight.watch(model, grad=True) as seen:
        out = models.run(model, inputs)
        (out * torch.randn_like(out)).sum().backward()
    assert all(seen.grad(n).shape == seen[n].shape for n in seen.maps if seen[n].grad is not None)
    assert sum(seen[n].grad is not None for n in seen.maps) >= len(seen.maps) / 2


@pytest.mark.parametrize("name", ["bert", "timm_vit", "torch_transformer", "own"])
def test_gradient_of_a_map_is_that_of_the_output(name):
    """By finite differences: adding t * E to a map changes the output at the rate <grad, E>."""
    model, inputs = models.make(name)
    model.double()
    inputs = models.cast(inputs, torch.float64)
    site = hosts.sites(model)[0].name
    with crosslight.watch(model, site, grad=True) as seen:
        models.run(model, inputs).square().sum().backward()
    direction = torch.randn_like(seen[site])
    step, values = 1e-6, []
    for sign in (1, -1):
        with (
            torch.no_grad(),
            crosslight.steer(model, lambda a, call, s=sign: a + s * step * direction, site),
        ):
            values.append(models.run(model, inputs).square().sum())
    rate = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((seen.grad(site) * direction).sum(), rate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "bart", "llama", "t5"])
@torch.no_grad()
def test_maps_equal_those_of_transformers(name):
    model, inputs = models.make(name)
    model.set_attn_implementation("eager")
    with crosslight.watch(model) as seen:
        out = model(**inputs, output_attentions=True)
    own = [
        a for field in ("encoder_attentions", "attentions", "decoder_attentions") for a in getattr(out, field, ()) or ()
    ]
    shown = [m for n, m in seen if seen_stream(seen, n) != "cross"]
    crossed = [m for n, m in seen if seen_stream(seen, n) == "cross"]
    assert len(own) == len(shown)
    assert len(crossed) == len(getattr(out, "cross_attentions", ()) or ())
    for a, b in zip([*own, *(getattr(out, "cross_attentions", ()) or ())], [*shown, *crossed], strict=True):
        assert torch.equal(a, b)
    # And without Crosslight in between.
    plain = model(**inputs, output_attentions=True)
    own_plain = getattr(plain, "encoder_attentions", None) or plain.attentions
    torch.testing.assert_close(own_plain[0], shown[0], rtol=0, atol=1e-6)
    # With SDPA the maps are the same.
    model.set_attn_implementation("sdpa")
    with crosslight.watch(model) as seen:
        model(**inputs)
    for (_, a), b in zip(seen, [m for _, m in seen], strict=True):
        torch.testing.assert_close(a, b)
    rows = inputs["attention_mask"].bool()
    first = next(iter(seen))[1]
    torch.testing.assert_close(first.transpose(1, 2)[rows], own_plain[0].transpose(1, 2)[rows], rtol=0, atol=1e-6)


def seen_stream(seen, name):
    return next(s.stream for s in seen.sites if s.name == name)


@torch.no_grad()
def test_multihead_attention_alone():
    for options in ({}, {"batch_first": True}, {"kdim": 12, "vdim": 10}, {"add_bias_kv": True, "add_zero_attn": True}):
        mha = nn.MultiheadAttention(16, 2, **options).eval()
        first = options.get("batch_first", False)
        q, k, v = (torch.randn((2, n, w) if first else (n, 2, w)) for n, w in ((4, 16), (5, mha.kdim), (5, mha.vdim)))
        padding = torch.tensor([[False] * 5, [False, True, False, False, True]])
        for mask in (None, torch.rand(4, 5) > 0.7, torch.randn(4, 5), torch.rand(4, 4, 5) > 0.8):
            for average in (True, False):
                args = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": average}
                if mask is not None and mask.dtype == torch.bool:
                    mask[..., 0] = False  # something to read in every row
                y, a = mha(q, k, v, **args)
                with crosslight.watch(mha) as seen:
                    y2, a2 = mha(q, k, v, **args)
                torch.testing.assert_close((y2, a2), (y, a), rtol=1e-5, atol=1e-5)
                assert seen[""].shape[:3] == (2, 2, 4)
    single = nn.MultiheadAttention(16, 2).eval()
    q = torch.randn(4, 16)
    plain = single(q, q, q)
    with crosslight.watch(single):
        torch.testing.assert_close(single(q, q, q), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_encoder_layer_alone_leaves_its_fused_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    plain = layer(x)
    with crosslight.watch(layer) as seen:
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    assert seen["self_attn"].shape == (2, 2, 5, 5)


@torch.no_grad()
def test_rules_see_the_call():
    model, inputs = models.make("llama")
    calls = []

    def look(weights, call):
        calls.append(call)
        return weights

    with crosslight.steer(model, look):
        model(**inputs)
    embedded = model.model.embed_tokens(inputs["input_ids"])
    assert torch.equal(calls[0].residual, embedded)
    assert torch.equal(calls[0].hidden, model.model.layers[0].input_layernorm(embedded))
    assert calls[0].context is None
    assert calls[0].site.name == "model.layers.0.self_attn"
    assert calls[0].q.shape == (2, 2, 7, 8)
    assert calls[0].k.shape == (2, 1, 7, 8)

    calls.clear()
    model, inputs = models.make("bart")
    with crosslight.steer(model, look, where="decoder.*encoder_attn"):
        out = model(**inputs)
    assert len(calls) == 2
    assert torch.equal(calls[0].context, out.encoder_last_hidden_state)

    calls.clear()
    model, inputs = models.make("own")
    with crosslight.steer(model, look):
        models.run(model, inputs)
    assert [c.context is None for c in calls] == [True, False]
    assert torch.equal(calls[1].context, inputs["z"])
    assert torch.equal(calls[0].hidden, inputs["x"])

    calls.clear()
    model, inputs = models.make("unet")
    with crosslight.steer(model, look, where=lambda s: s.stream == "cross"):
        models.run(model, inputs)
    assert calls
    assert all(torch.equal(c.context, inputs["encoder_hidden_states"]) for c in calls)


@torch.no_grad()
def test_rules_nest_in_order():
    model, inputs = models.make("timm_vit")
    double, shift = (lambda a, c: 2 * a), (lambda a, c: a + 1)
    with crosslight.watch(model, "blocks.0.*") as seen:
        models.run(model, inputs)
        plain = seen["blocks.0.attn"]
        with crosslight.steer(model, double):
            with crosslight.steer(model, shift):
                models.run(model, inputs)
            torch.testing.assert_close(seen["blocks.0.attn"], 2 * plain + 1)
            models.run(model, inputs)
            torch.testing.assert_close(seen["blocks.0.attn"], 2 * plain)
    assert len(seen) == 3
    assert len(seen.maps["blocks.0.attn"]) == 3


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_an_exception_restores_the_host(name):
    model, inputs = models.make(name)
    before, plain = state_of(model), models.run(model, inputs)

    def fails(weights, call):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), crosslight.steer(model, fails):
        models.run(model, inputs)
    assert state_of(model) == before
    assert torch.equal(models.run(model, inputs), plain)


@torch.no_grad()
def test_gating_a_head_is_a_rule():
    """Gate 0 equals zeroing the head's slice of the output projection."""
    model, inputs = models.make("bart")
    site = "encoder.layers.0.self_attn"

    def gate(weights, call):
        return weights * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)

    with crosslight.steer(model, gate, site):
        gated = models.run(model, inputs)
    model.get_submodule(site).out_proj.weight[:, 8:] = 0
    torch.testing.assert_close(models.run(model, inputs), gated, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generation_with_a_cache():
    model, inputs = models.make("llama")
    plain = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with crosslight.watch(model) as seen:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False), plain)
    lengths = [tuple(m.shape[2:]) for m in seen.maps["model.layers.0.self_attn"]]
    assert lengths == [(7, 7), (1, 8), (1, 9), (1, 10)]
    with crosslight.swap(model, "softmax"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False), plain)

    transformers = pytest.importorskip("transformers")
    model = transformers.BartForConditionalGeneration(models.bart()[0].config).eval()
    inputs = {"input_ids": models.IDS, "attention_mask": models.KEEP}
    plain = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2)
    with crosslight.swap(model, "softmax"), crosslight.watch(model, "*encoder_attn") as seen:
        swapped = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2)
    assert torch.equal(swapped, plain)
    assert all(m.shape[2:] == (1, 7) for _, m in seen)


@torch.no_grad()
def test_chunked_prefill_continues_causally():
    """Several queries after a cache: query i is at position offset + i."""
    model, _ = models.make("llama")
    ids = models.IDS
    whole = model(ids).logits
    with crosslight.swap(model, "softmax"):
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision():
    for name in ("llama", "timm_vit", "torch_transformer", "own"):
        model, inputs = models.make(name)
        model.bfloat16()
        inputs = models.cast(inputs, torch.bfloat16)
        plain = models.run(model, inputs)
        with crosslight.watch(model) as seen:
            watched = models.run(model, inputs)
        assert all(m.dtype == torch.bfloat16 for _, m in seen)
        torch.testing.assert_close(watched, plain, rtol=0.05, atol=0.05)
        with crosslight.swap(model, "softmax"):
            torch.testing.assert_close(models.run(model, inputs), plain, rtol=0.05, atol=0.05)


def test_dropout_is_the_hosts_and_after_the_rule():
    mha = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True).train()
    x = torch.randn(2, 64, 16)
    with crosslight.watch(mha) as seen:
        a, b = mha(x, x, x)[0], mha(x, x, x)[0]
    assert not torch.equal(a, b)
    first, second = seen.maps[""]
    assert torch.equal(first, second)  # the map is that before dropout
    mha.eval()
    with crosslight.watch(mha):
        assert torch.equal(mha(x, x, x)[0], mha(x, x, x)[0])


def test_gradient_checkpointing_records_once():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(models.llama()[0].config).train()
    plain = model(models.IDS, labels=models.IDS).loss
    plain.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with crosslight.watch(model) as seen:
        loss = model(models.IDS, labels=models.IDS).loss
        loss.backward()
    assert len(seen) == 2
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient)


@pytest.mark.parametrize("name", SWAPPABLE)
@torch.no_grad()
def test_a_copy_of_a_swapped_model_stands_alone(name):
    model, inputs = models.make(name)
    with crosslight.swap(model, "softmax"):
        twin = copy.deepcopy(model)
    plain = models.run(model, inputs)
    torch.testing.assert_close(models.run(twin, inputs), plain, rtol=1e-5, atol=1e-5)
    for p in twin.parameters():
        p.mul_(1.5)
    assert not torch.allclose(models.run(twin, inputs), plain)  # it uses its own weights
    assert torch.equal(models.run(model, inputs), plain)
    with crosslight.watch(twin) as seen:
        models.run(twin, inputs)
    assert len(seen) > 0


def test_unknown_models_and_places():
    with pytest.raises(CrosslightError, match="Linear has no attention that Crosslight knows"):
        crosslight.swap(nn.Linear(2, 2), "softmax")
    model, _ = models.make("timm_vit")
    with pytest.raises(CrosslightError, match=r"where: got 'blocks.9.attn'.*blocks\.0\.attn"):
        crosslight.watch(model, "blocks.9.attn").__enter__()
    with pytest.raises(CrosslightError, match="rule: got int"):
        crosslight.steer(model, 3).__enter__()
    with crosslight.watch(model) as seen, pytest.raises(CrosslightError, match="has not been called"):
        seen["blocks.0.attn"]
    with pytest.raises(CrosslightError, match=r"expected one of blocks\.0\.attn"):
        seen["blocks"]
    with pytest.raises(CrosslightError, match="forms its attention matrix itself"):
        crosslight.swap(models.make("lxmert")[0], "softmax")


def test_a_rule_must_keep_the_shape():
    model, inputs = models.make("timm_vit")
    with pytest.raises(CrosslightError, match="rule: got"), crosslight.steer(model, lambda a, c: a[:1]):
        models.run(model, inputs)


@torch.no_grad()
def test_watch_a_part_of_a_model():
    model, inputs = models.make("bart")
    with crosslight.watch(model, "*encoder_attn") as seen:
        models.run(model, inputs)
    assert [n for n, _ in seen] == ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]
    with crosslight.watch(model.decoder) as seen:
        models.run(model, inputs)
    assert next(iter(seen))[0] == "layers.0.self_attn"
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["bert", "timm_vit", "handwritten"])
@torch.no_grad()
def test_compiled_swap(name):
    """A swapped model compiles to one graph."""
    model, inputs = models.make(name)
    plain = models.run(model, inputs)
    crosslight.swap(model, "softmax")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(models.run(compiled, inputs), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_processors_without_sdpa():
    model, inputs = models.make("unet")
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())
    before, plain = dict(model.attn_processors), models.run(model, inputs)
    with crosslight.watch(model) as seen:
        torch.testing.assert_close(models.run(model, inputs), plain, rtol=1e-5, atol=1e-5)
    assert len(seen) == len(seen.sites)
    assert all(model.attn_processors[n] is p for n, p in before.items())


class Windows(nn.Module):
    """Attention with an axis of windows beside the batch, and a mask for each window."""

    def __init__(self, size=4):
        super().__init__()
        self.num_heads, self.dim, self.size = 2, 16, size
        self.qkv = nn.Linear(16, 48)
        self.keep = torch.rand(3, 1, size, size) > 0.4
        self.keep[..., 0] = True

    def forward(self, x):
        w = x.unflatten(1, (-1, self.size))
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(2, 3) for t in self.qkv(w).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.keep)
        return y.transpose(2, 3).flatten(3).flatten(1, 2)


@torch.no_grad()
def test_windows_beside_the_batch():
    model, x = Windows(), torch.randn(2, 12, 16)
    plain = model(x)
    with crosslight.watch(model) as seen:
        torch.testing.assert_close(model(x), plain)
    assert seen[""].shape == (6, 2, 4, 4)
    assert (seen[""].unflatten(0, (2, 3)).masked_select(~model.keep) == 0).all()
    with crosslight.swap(model, "softmax"):
        torch.testing.assert_close(model(x), plain)


def test_attention_that_is_not_seen_is_an_error():
    """A site that computes its matrix in a way of its own must not pass for one that was watched."""

    class OddAttention(nn.Module):
        num_heads, dim = 2, 4

        def forward(self, x):
            return x.exp().softmax(0)

    with (
        pytest.raises(CrosslightError, match="ran without an attention call"),
        crosslight.watch(OddAttention()) as seen,
    ):
        seen.sites[0].module(torch.randn(3, 4))
