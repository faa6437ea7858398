"""The contract of kind fusion, held by every row of this directory: flow by gradients, masks, errors, cores."""

import copy

import pytest
import torch

from crosslight.attention.base import Mechanism
from crosslight.errors import CrosslightError
from crosslight.fusion.base import Fusion
from crosslight.fusion.crossvit import CrossFusion
from crosslight.fusion.multi_source_decoder import MultiSourceDecoder
from crosslight.fusion.poly_encoder import PolyEncoder

BLOCKS = [
    pytest.param(MultiSourceDecoder, {"strategy": "serial"}, id="serial"),
    pytest.param(MultiSourceDecoder, {"strategy": "parallel"}, id="parallel"),
    pytest.param(MultiSourceDecoder, {"strategy": "flat"}, id="flat"),
    pytest.param(MultiSourceDecoder, {"strategy": "hierarchical"}, id="hierarchical"),
    pytest.param(CrossFusion, {}, id="crossvit"),
    pytest.param(CrossFusion, {"rounds": 2}, id="crossvit-2"),
    pytest.param(PolyEncoder, {}, id="poly-encoder"),
    pytest.param(PolyEncoder, {"source": "first"}, id="poly-first"),
]


def sample(make: type[Fusion], options: dict) -> tuple[Fusion, dict[str, torch.Tensor]]:
    block, streams = make.sample(**options)
    return block.double().eval(), {name: t.double() for name, t in streams.items()}


@pytest.mark.parametrize(("make", "options"), BLOCKS)
def test_flow_is_what_the_gradients_say(make, options):
    block, streams = sample(make, options)
    streams = {name: t.requires_grad_() for name, t in streams.items()}
    out = block(streams)
    assert set(out) == set(block.flow)
    for name, y in out.items():
        grads = torch.autograd.grad(y.square().sum(), list(streams.values()), allow_unused=True, retain_graph=True)
        read = {n for n, g in zip(streams, grads, strict=True) if g is not None and g.abs().max() > 1e-9}
        assert read == set(block.flow[name])


@pytest.mark.parametrize(("make", "options"), BLOCKS)
def test_masked_tokens_have_no_influence(make, options):
    block, streams = sample(make, options)
    masks = {name: torch.ones(t.shape[:2], dtype=torch.bool) for name, t in streams.items()}
    changed = dict(streams)
    for name in streams:
        if isinstance(block, MultiSourceDecoder) and name == "decoder":
            continue
        if isinstance(block, PolyEncoder) and name == "candidate":
            continue
        masks[name][0, 2:] = False
        changed[name] = streams[name].clone()
        changed[name][0, 2:] += 5.0
    for name, y in block(streams, masks).items():
        z = block(changed, masks)[name]
        read = slice(0, 2) if isinstance(block, CrossFusion) else slice(None)  # its patches pass through
        torch.testing.assert_close(y[:, read], z[:, read])
        assert (block(streams)[name] - y)[0].abs().max() > 1e-6
        torch.testing.assert_close(block(streams)[name][1], y[1])


@pytest.mark.parametrize(("make", "options"), BLOCKS)
def test_a_stream_with_everything_masked_gives_finite_output_and_gradients(make, options):
    block, streams = sample(make, options)
    masks = {name: torch.zeros(t.shape[:2], dtype=torch.bool) for name, t in streams.items()}
    streams = {name: t.requires_grad_() for name, t in streams.items()}
    total = sum(y.sum() for y in block(streams, masks).values())
    grads = torch.autograd.grad(total, list(streams.values()), allow_unused=True)
    assert total.isfinite()
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("make", "options"), BLOCKS)
def test_maps_are_distributions(make, options):
    block, streams = sample(make, options)
    maps = block.weights(streams)
    rows = [w.sum(-1) for w in maps.values()]
    if options.get("strategy") == "flat":
        rows = [torch.stack(rows).sum(0)]
    for row in rows:
        torch.testing.assert_close(row, torch.ones_like(row))


@pytest.mark.parametrize(("make", "options"), BLOCKS)
def test_examples_are_independent_and_copies_equal(make, options):
    block, streams = sample(make, options)
    other = copy.deepcopy(block)
    other.load_state_dict(block.state_dict())
    alone = other({name: t[1:] for name, t in streams.items()})
    for name, y in block(streams).items():
        torch.testing.assert_close(y[1:], alone[name])


@pytest.mark.parametrize("make", [MultiSourceDecoder, CrossFusion])
@pytest.mark.parametrize("core", ["agent-attention", "efficient-attention", "mhe"])
def test_any_mechanism_can_be_the_core(make, core):
    block, streams = sample(make, {"attention": core})
    assert {m.card.id for m in block.modules() if isinstance(m, Mechanism)} == {core}
    test_flow_is_what_the_gradients_say(make, {"attention": core})
    for (asks, read), map in block.weights(streams).items():
        n = 1 if make is CrossFusion else streams[asks].shape[1]
        assert map.shape == (2, 2, n, streams[read].shape[1])


def test_the_core_takes_its_options_and_must_have_the_pattern():
    block, _ = MultiSourceDecoder.sample(attention="softmax", attention_options={"kv_heads": 1})
    assert block.attend[0].k.out_features == 8
    message = "attention: got 'dual-triangle', expected a mechanism of kind token with noncausal-cross attention"
    with pytest.raises(CrosslightError, match=message):
        CrossFusion.sample(attention="dual-triangle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("large"), "streams: got no large, expected all of small, large"),
        (lambda s: s.update(huge=s["large"]), "streams: got unknown huge, expected only small, large"),
        (lambda s: s.update(large=s["small"]), "streams['large']: got (2, 7, 16), expected (batch, tokens >= 1, 24)"),
        (lambda s: s.update(large=s["large"][:1]), "streams['large']: got batch 1, expected batch 2 as small"),
        (lambda s: s.update(large=s["large"].double()), "streams['large']: got torch.float64"),
        (lambda s: s.update(large=s["large"][0]), "streams['large']: got (6, 24)"),
    ],
)
def test_wrong_streams_are_named(change, message):
    block, streams = CrossFusion.sample()
    change(streams)
    with pytest.raises(CrosslightError) as error:
        block(streams)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"huge": None}, "masks: got unknown huge, expected only small, large"),
        ({"large": torch.ones(2, 9, dtype=torch.bool)}, "masks['large']: got torch.bool (2, 9), expected torch.bool"),
        ({"large": torch.ones(2, 6)}, "masks['large']: got torch.float32 (2, 6), expected torch.bool (2, 6)"),
        ({"large": None}, "masks['large']: got NoneType"),
    ],
)
def test_wrong_masks_are_named(masks, message):
    block, streams = CrossFusion.sample()
    with pytest.raises(CrosslightError) as error:
        block(streams, masks)
    assert message in str(error.value)


@pytest.mark.parametrize("streams", [{"alone": 16}, {"a": 16, "b": 0}, 16])
def test_wrong_declarations_are_named(streams):
    with pytest.raises(CrosslightError, match="streams"):
        MultiSourceDecoder(streams)
