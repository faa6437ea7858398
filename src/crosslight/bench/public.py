"""Rows beside their public implementations, in turns within one run: `crosslight bench --public`.

Each pair is built at a shape of the row's paper, with the same weights where these map over, so that a ratio compares
the same work: the outputs must be equal before any call is timed. A call is forward and backward, with gradients of
input and parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosslight import registry
from crosslight.attention.backbone import to_tokens
from crosslight.bench import timing
from crosslight.bench.figures import Figure, written
from crosslight.errors import CrosslightError, MissingExtra, require

#: Largest difference of two outputs, of the largest output.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Side:
    """A module, its input and how to call it."""

    module: nn.Module
    x: Tensor
    forward: Callable[[Tensor], Tensor]

    def __call__(self) -> tuple[Tensor, ...]:
        """Forward, and the gradients of input and parameters."""
        wanted: list[Tensor] = [p for p in self.module.parameters() if p.requires_grad]
        if self.x.is_floating_point():
            wanted.append(self.x)
        y = self.forward(self.x)
        return torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)


#: Ours, theirs, and their output as ours has it; None where weights do not map over and only the sizes are alike.
Sides = tuple[Side, Side, Callable[[Tensor], Tensor] | None]


@dataclass(frozen=True)
class Pair:
    """A row and a public implementation of it.

    Attributes:
        row: the row's id.
        other: package and class.
        shape: what both are given.
        source: where the shape comes from.
    """

    row: str
    other: str
    shape: str
    source: str
    build: Callable[[], Sides]

    @property
    def name(self) -> str:
        return f"{self.row} over {self.other}, {self.shape}"


@dataclass(frozen=True)
class Compared(Figure):
    """The ratio of a pair, with what its line in the table needs."""

    row: str = ""
    other: str = ""
    shape: str = ""
    source: str = ""
    equal: bool = False


PAIRS: list[Pair] = []


def pair(row: str, other: str, shape: str, source: str) -> Callable[[Callable[[], Sides]], Callable[[], Sides]]:
    def mark(build: Callable[[], Sides]) -> Callable[[], Sides]:
        PAIRS.append(Pair(row, other, shape, source, build))
        return build

    return mark


# What building a pair needs -----------------------------------------------------------------------------------------
_models, _test = partial(require, extra="models"), partial(require, extra="test")


def _package(module: str, name: str) -> Any:
    """A package that no extra brings."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{error.name or name} is not installed: pip install {name}") from error


def _same(y: Tensor) -> Tensor:
    return y


def _tokens(y: Tensor) -> Tensor:
    return to_tokens(y)[0]


def _load(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str], **given: Tensor) -> None:
    """Give our module their parameters.

    Args:
        names: their parameter or module -> ours; several of ours share out the first axis ("qkv": "q k v"), and those
            of "" are left out.
        given: parameters of ours that theirs has not.
    """
    own = dict(given)
    shapes = {name: t.shape for name, t in ours.state_dict().items()}
    for name, t in theirs.state_dict().items():
        module, dot, leaf = name.rpartition(".")
        if name in names:
            targets = names[name].split()
        else:
            targets = [f"{target}{dot}{leaf}" for target in names.get(module, module or " ").split()]
            targets = targets if module else [leaf]
        if targets:
            sizes = [shapes[target][0] for target in targets] if len(targets) > 1 else [len(t)] if t.dim() else []
            parts = t.split(sizes) if sizes else [t]
            own |= {target: part.reshape(shapes[target]) for target, part in zip(targets, parts, strict=True)}
    ours.load_state_dict(own)


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _alike(ours: nn.Module, theirs: nn.Module, x: Tensor, read: Any = None, read_other: Any = None) -> Sides:
    """Both on one input, with outputs that are to be equal."""
    return Side(ours, x, read or ours), Side(theirs, x, read_other or theirs), _same


# Feature maps -------------------------------------------------------------------------------------------------------
def _map(ours: nn.Module, theirs: nn.Module, shape: Sequence[int]) -> Sides:
    return _alike(ours, theirs, _input(*shape))


def _eca(channels: int, side: int) -> Sides:
    ours, theirs = registry.create("eca", channels=channels), _models("timm.layers").EcaModule(channels)
    _load(ours, theirs, {})
    return _map(ours, theirs, (8, channels, side, side))


def _cbam(channels: int, side: int) -> Sides:
    ours = registry.create("cbam", channels=channels, norm=True)
    theirs = _models("timm.layers.cbam").CbamModule(channels, rd_ratio=1 / 16)
    names = {"channel.fc1": "channel.mlp.0", "channel.fc2": "channel.mlp.2", "spatial.conv.conv": "spatial.conv"}
    _load(ours, theirs, names | {"spatial.conv.bn": "spatial.norm"})
    return _map(ours, theirs, (8, channels, side, side))


for _channels, _side in ((256, 56), (2048, 7)):
    _shape = f"(8, {_channels}, {_side}, {_side})"
    pair("eca", "timm EcaModule", _shape, "ResNet-50 at 224")(partial(_eca, _channels, _side))
    pair("cbam", "timm CbamModule", _shape, "ResNet-50 at 224")(partial(_cbam, _channels, _side))


# Tokens of images ---------------------------------------------------------------------------------------------------
@pair("softmax", "timm Attention", "(8, 197, 768), 12 heads", "ViT-B/16 at 224")
def _vit() -> Sides:
    ours = registry.create("softmax", dim=768, heads=12)
    theirs = _models("timm.layers").Attention(768, num_heads=12, qkv_bias=True)
    _load(ours, theirs, {"qkv": "q k v", "proj": "out"})
    return _alike(ours, theirs, _input(8, 197, 768))


def _xcit(batch: int, n: int) -> Sides:
    ours = registry.create("xcit", dim=384, heads=8)
    theirs = _models("timm.models.xcit").XCA(384, num_heads=8, qkv_bias=True)
    _load(ours, theirs, {"qkv": "q k v", "proj": "out", "temperature": "core.temperature"})
    return _alike(ours, theirs, _input(batch, n, 384))


pair("xcit", "timm XCA", "(16, 196, 384), 8 heads", "XCiT-S/16 at 224")(partial(_xcit, 16, 196))
pair("xcit", "timm XCA", "(4, 784, 384), 8 heads", "XCiT-S/8 at 224")(partial(_xcit, 4, 784))


def _davit(batch: int, n: int, dim: int) -> Sides:
    ours = registry.create("davit", dim=dim, heads=dim // 32)
    theirs = _models("timm.models.davit").ChannelAttention(dim, num_heads=dim // 32, qkv_bias=True)
    _load(ours, theirs, {"qkv": "v q k", "proj": "out"})  # channels ask in the place of tokens
    return _alike(ours, theirs, _input(batch, n, dim))


pair("davit", "timm ChannelAttention", "(4, 3136, 96), 3 heads", "DaViT-T at 224, stage 1")(
    partial(_davit, 4, 3136, 96)
)
pair("davit", "timm ChannelAttention", "(16, 196, 384), 12 heads", "DaViT-T at 224, stage 3")(
    partial(_davit, 16, 196, 384)
)


def _twins(local: bool) -> Sides:
    twins, grid = _models("timm.models.twins"), (56, 56)
    if local:
        ours, theirs = registry.create("twins", dim=64, heads=2, window=7), twins.LocallyGroupedAttn(64, 2, ws=7)
    else:
        ours = registry.create("twins", dim=64, heads=2, reduction=8)
        theirs = twins.GlobalSubSampleAttn(64, 2, sr_ratio=8)
    names = {"qkv": "q k v", "kv": "k v", "proj": "out", "sr": "summaries.conv", "norm": "summaries.norm"}
    _load(ours, theirs, names)
    return _alike(ours, theirs, _input(4, 3136, 64), lambda x: ours(x, grid=grid), lambda x: theirs(x, grid))


pair("twins", "timm LocallyGroupedAttn", "(4, 56 x 56, 64), 2 heads, window 7", "SVT-S at 224, stage 1")(
    partial(_twins, True)
)
pair("twins", "timm GlobalSubSampleAttn", "(4, 56 x 56, 64), 2 heads, reduction 8", "SVT-S at 224, stage 1")(
    partial(_twins, False)
)


@pair("halonet", "timm HaloAttn", "(4, 64 x 64, 64), 4 heads, block 8, halo 3", "H0 at 256, stage 1")
def _halonet() -> Sides:
    ours = registry.create("halonet", dim=64, heads=4, block=8, halo=3, bias=False)
    theirs = _models("timm.layers.halo_attn").HaloAttn(64, num_heads=4, dim_head=16, block_size=8, halo_size=3)
    # Theirs keeps keys and values head by head, and has no output projection.
    k, v = theirs.kv.weight.detach().flatten(1).unflatten(0, (4, 32)).split(16, 1)
    names = {"kv": "", "pos_embed.height_rel": "core.rows", "pos_embed.width_rel": "core.columns"}
    _load(
        ours, theirs, names, **{"k.weight": k.flatten(0, 1), "v.weight": v.flatten(0, 1), "out.weight": torch.eye(64)}
    )
    ours.out = nn.Identity()
    x = _input(4, 64, 64, 64)
    tokens = _tokens(x).detach().contiguous().requires_grad_()
    return Side(ours, tokens, lambda x: ours(x, grid=(64, 64))), Side(theirs, x, theirs), _tokens


@pair("shvit", "timm SHSA", "(32, 14 x 14, 224), 48 channels attend", "S1 at 224, stage 2")
def _shvit() -> Sides:
    ours = registry.create("shvit", dim=224, partial=48, qk_dim=16)
    theirs = _models("timm.models.shvit").SHSA(224, qk_dim=16, pdim=48)
    nn.init.ones_(theirs.proj[1].bn.weight)  # starts at zero
    names = {"pre_norm": "norm", "qkv.c": "q.linear k.linear v.linear", "qkv.bn": "q.norm k.norm v.norm"}
    names |= {"proj.1.c": "out.linear", "proj.1.bn": "out.norm"}
    own = {f"{part}.norm.num_batches_tracked": torch.zeros(()) for part in ("q", "k", "v", "out")}
    ignored = {"qkv.bn.num_batches_tracked": "", "proj.1.bn.num_batches_tracked": ""}
    _load(ours, theirs, names | ignored, **own)
    x = _input(32, 224, 14, 14)
    tokens = _tokens(x).detach().contiguous().requires_grad_()
    return Side(ours, tokens, ours), Side(theirs, x, theirs), _tokens


@pair("crossformer", "vit-pytorch crossformer.Attention", "(4, 56 x 56, 64), 2 heads, group 7", "CrossFormer-T")
def _crossformer() -> Sides:
    # Theirs has one position bias for all heads.
    ours = registry.create("crossformer", dim=64, heads=2, group=7)
    theirs = _package("vit_pytorch.crossformer", "vit-pytorch").Attention(64, "short", 7, dim_head=32)
    theirs.norm = nn.Identity()
    x = _input(4, 64, 56, 56)
    tokens = _tokens(x).detach().contiguous().requires_grad_()
    return Side(ours, tokens, lambda x: ours(x, grid=(56, 56))), Side(theirs, x, theirs), None


@pair("dual-patchnorm", "vit-pytorch ViT.to_patch_embedding", "(8, 3, 224, 224) to 768", "B/16 at 224")
def _dual_patchnorm() -> Sides:
    from crosslight.attention.dual_patchnorm import PatchEmbedding, patches

    theirs = (
        _package("vit_pytorch", "vit-pytorch")
        .ViT(image_size=224, patch_size=16, num_classes=0, dim=768, depth=1, heads=1, mlp_dim=8)
        .to_patch_embedding
    )
    ours = PatchEmbedding(768, 768, eps=theirs[1].eps)
    # Ours flattens a patch channel by channel, theirs pixel by pixel.
    weight = theirs[2].weight.detach().unflatten(1, (256, 3)).transpose(1, 2).flatten(1)
    _load(ours, theirs, {"1": "pre", "2.weight": "", "2": "project", "3": "post"}, **{"project.weight": weight})
    return _alike(ours, theirs, _input(8, 3, 224, 224), lambda x: ours(patches(x, 16)))


@pair("crossvit", "timm CrossVit", "(2, 3, 240, 240)", "CrossViT-S at 240, the whole network")
def _crossvit() -> Sides:
    ours, theirs = registry.create("crossvit", preset="small_240"), _models("timm").create_model("crossvit_small_240")
    names: dict[str, str] = {"norm.0": "norms.0", "norm.1": "norms.1", "head.0": "heads.0", "head.1": "heads.1"}
    for branch in "01":
        names |= {f"cls_token_{branch}": f"class_token.{branch}", f"pos_embed_{branch}": f"position.{branch}"}
        names[f"patch_embed.{branch}.proj"] = f"embed.{branch}"
    for name, _ in theirs.named_modules():
        first, *rest = name.split(".")
        if first != "blocks" or len(rest) < 3:
            continue
        stage, kind, branch, *inner = rest
        if kind == "blocks" and inner:
            leaf = ".".join(inner[1:])
            to = f"stages.{stage}.branches.{branch}.{inner[0]}"
            parts = {
                "attn.qkv": ("attend.q", "attend.k", "attend.v"),
                "attn.proj": ("attend.out",),
                "mlp.fc1": ("mlp.0",),
                "mlp.fc2": ("mlp.2",),
            }.get(leaf, (leaf,))
            names[name] = " ".join(f"{to}.{part}" for part in parts)
        elif kind == "fusion":
            own = {"norm1": "norms.0", "attn.wq": "q", "attn.wk": "k", "attn.wv": "v", "attn.proj": "out"}
            leaf = ".".join(inner)
            if leaf in own:
                at = own[leaf] if leaf == "norm1" else f"attend.0.{own[leaf]}"
                names[name] = f"stages.{stage}.fusion.crossings.{branch}.{at}"
        elif inner:
            to = {"projs": "into", "revert_projs": "back"}[kind]
            names[name] = f"stages.{stage}.fusion.crossings.{branch}.{to}.{inner[0]}"
    _load(ours, theirs, names)
    return _alike(ours, theirs, _input(2, 3, 240, 240))


# Tokens of text -----------------------------------------------------------------------------------------------------
@pair("softmax", "torch nn.MultiheadAttention", "(16, 256, 512), 8 heads", "the base Transformer")
def _multihead() -> Sides:
    ours = registry.create("softmax", dim=512, heads=8)
    theirs = nn.MultiheadAttention(512, 8, batch_first=True)
    names = {"in_proj_weight": "q.weight k.weight v.weight", "in_proj_bias": "q.bias k.bias v.bias", "out_proj": "out"}
    _load(ours, theirs, names)
    return _alike(ours, theirs, _input(16, 256, 512), None, lambda x: theirs(x, x, x, need_weights=False)[0])


@pair("softmax", "diffusers Attention", "(2, 64 x 64, 320) reads (77, 768), 8 heads", "Stable Diffusion 1.5")
def _diffusion() -> Sides:
    theirs = _models("diffusers.models.attention_processor").Attention(
        320, cross_attention_dim=768, heads=8, dim_head=40
    )
    ours = registry.create("softmax", dim=320, heads=8, context_dim=768)
    zeros = {f"{name}.bias": torch.zeros(320) for name in "qkv"}
    _load(ours, theirs, {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}, **zeros)
    z = _input(2, 77, 768)
    for p in (ours.q.bias, ours.k.bias, ours.v.bias):  # theirs has none
        p.requires_grad_(False)
    return _alike(ours, theirs, _input(2, 4096, 320), lambda x: ours(x, z), lambda x: theirs(x, z))


def _x_transformers(row: str, shape: tuple[int, int, int], heads: int, theirs: dict[str, Any], **own: Any) -> Sides:
    batch, n, dim = shape
    attention = _test("x_transformers.x_transformers").Attention(
        dim, heads=heads, dim_head=dim // heads, causal=True, **theirs
    )
    ours = registry.create(row, dim=dim, heads=heads, bias=False, **own)
    _load(ours, attention, {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"})
    return _alike(
        ours, attention, _input(batch, n, dim), lambda x: ours(x, causal=True), lambda x: _first(attention(x))
    )


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


pair("softmax", "x-transformers Attention", "(4, 1024, 512), 8 heads, causal", "the base Transformer")(
    partial(_x_transformers, "softmax", (4, 1024, 512), 8, {"flash": True})
)
pair("mqa", "x-transformers Attention, one_kv_head", "(8, 256, 1024), 8 heads of 128, causal", "the paper, section 4")(
    partial(_x_transformers, "mqa", (8, 256, 1024), 8, {"flash": True, "one_kv_head": True})
)
pair("sigmoid-attention", "x-transformers Attention, sigmoid", "(1, 2048, 1024), 16 heads, causal", "the paper, LM")(
    partial(_x_transformers, "sigmoid-attention", (1, 2048, 1024), 16, {"sigmoid": True}, score_bias=0.0)
)


def _causal(n: int) -> Tensor:
    """An additive mask, as transformers hands it to layers."""
    return torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]


_PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}


@pair("softmax", "transformers LlamaAttention", "(1, 1024, 2048), 32 heads, 8 key heads, causal, RoPE", "Llama 3.2 1B")
def _llama() -> Sides:
    module, n = _models("transformers.models.llama.modeling_llama"), 1024
    config = module.LlamaConfig(
        hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, attn_implementation="sdpa"
    )
    ours = registry.create("softmax", dim=2048, heads=32, kv_heads=8, bias=False, position="rope")
    theirs, x = module.LlamaAttention(config, 0), _input(1, n, 2048)
    _load(ours, theirs, _PROJECTIONS)
    angles = module.LlamaRotaryEmbedding(config)(x.detach(), torch.arange(n)[None])
    return _alike(ours, theirs, x, lambda x: ours(x, causal=True), lambda x: theirs(x, angles, None)[0])


def _doge(row: str, names: dict[str, str], n: int, **own: Any) -> Sides:
    module = _models("transformers.models.doge.modeling_doge")
    config = module.DogeConfig(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    ours, theirs, x = registry.create(row, dim=256, heads=2, **own), module.DogeAttention(config, 0), _input(1, n, 256)
    nn.init.normal_(theirs.A)  # equal keys are no choice
    _load(ours, theirs, _PROJECTIONS | names)
    angles, mask = module.DogeRotaryEmbedding(config)(x.detach(), torch.arange(n)[None]), _causal(n)
    return _alike(ours, theirs, x, lambda x: ours(x, causal=True), lambda x: theirs(x, angles, mask)[0])


for _n in (2048, 4096):
    _shape = f"(1, {_n}, 256), 2 heads, window 2048, causal"
    pair("dynamic-mask-attention", "transformers DogeAttention", _shape, "Doge-20M")(
        partial(_doge, "dynamic-mask-attention", {"dt_proj": "dt"}, _n, kv_heads=1)
    )
pair("wonderful-matrices", "transformers DogeAttention", "(1, 2048, 256), 2 heads, window 2048, causal", "Doge-20M")(
    partial(_doge, "wonderful-matrices", {"dt_proj": "dt", "A": "a"}, 2048, groups=1)
)


@pair("t5gemma2-merged-attention", "transformers T5Gemma2MergedAttention", "(1, 512, 640) reads 512, 4 heads of 256",
      "270M-270M")  # fmt: skip
def _t5gemma2() -> Sides:
    from_config = _models("transformers.models.t5gemma2.configuration_t5gemma2")
    module, n = _models("transformers.models.t5gemma2.modeling_t5gemma2"), 512
    config = from_config.T5Gemma2DecoderConfig(
        hidden_size=640,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        num_hidden_layers=1,
        query_pre_attn_scalar=256,
        layer_types=["full_attention"],
    )
    config._attn_implementation = "sdpa"
    theirs = module.T5Gemma2MergedAttention(config, 0)
    ours = registry.create("t5gemma2-merged-attention", dim=640, heads=4, kv_heads=1, head_dim=256)
    _load(ours, theirs, _PROJECTIONS)
    z, angles = _input(1, n, 640), torch.arange(n)[:, None] * 10_000.0 ** (-torch.arange(0, 256, 2) / 256)
    angles = torch.cat([angles, angles], -1)[None]
    turn, mask = (angles.cos(), angles.sin()), torch.cat([_causal(n), torch.zeros(1, 1, n, n)], -1)
    x = _input(1, n, 640)
    return _alike(ours, theirs, x, lambda x: ours(x, z, causal=True), lambda x: theirs(x, turn, mask, z)[0])


@pair("moa-heads", "transformers JetMoeAttention", "(4, 512, 512), 8 heads of 64 out of 32, causal", "the paper, 8K32E")
def _jetmoe() -> Sides:
    module, n = _models("transformers.models.jetmoe.modeling_jetmoe"), 512
    config = module.JetMoeConfig(
        hidden_size=512, num_local_experts=32, num_experts_per_tok=8, num_key_value_heads=1, kv_channels=64
    )
    config._attn_implementation = "sdpa"
    theirs, x = module.JetMoeAttention(config, 0), _input(4, n, 512)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.02)
    nn.init.zeros_(theirs.experts.bias)
    ours = registry.create("moa-heads", dim=512, heads=8, head_dim=64, experts=32, position="rope", renormalise="full")
    linear = {f"{a}.weight": getattr(theirs.experts, b).weight.detach().mT
              for a, b in (("q", "input_linear"), ("out", "output_linear"))}  # fmt: skip
    names = {"experts.input_linear": "", "experts.output_linear": "", "experts.bias": "", "kv_proj": "k v"}
    _load(ours, theirs, names | {"experts.router.layer": "router"}, **linear)
    angles = module.JetMoeRotaryEmbedding(config)(x.detach(), torch.arange(n)[None])
    return _alike(
        ours,
        theirs,
        x,
        lambda x: ours(x, causal=True),
        lambda x: theirs(x, position_embeddings=angles)[0],
    )


@pair(
    "masformer",
    "transformers GPTNeoForCausalLM",
    "(1, 512) tokens, width 2048, 16 heads, 1 full layer",
    "the 1.3B one",
)
def _masformer() -> Sides:
    from crosslight.attention.masformer import Decoder

    config = _models("transformers").GPTNeoConfig(
        vocab_size=1024,
        hidden_size=2048,
        num_layers=1,
        num_heads=16,
        max_position_embeddings=512,
        attention_types=[[["global"], 1]],
    )
    ours = Decoder(vocab=1024, length=512, depth=1, full_layers=1)
    theirs = _models("transformers").GPTNeoForCausalLM(config)
    names = {"transformer.wte": "embed", "transformer.wpe": "positions", "transformer.ln_f": "norm", "lm_head": ""}
    leaves = {f"attn.attention.{a}": f"attend.{b}" for a, b in _PROJECTIONS.items() if a != "o_proj"}
    leaves |= {"attn.attention.out_proj": "attend.out", "ln_1": "norm1", "ln_2": "norm2"}
    leaves |= {"mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    names |= {f"transformer.h.0.{a}": f"layers.0.{b}" for a, b in leaves.items()}
    _load(ours, theirs, names)
    with torch.no_grad():
        ours.get_parameter("layers.0.attend.q.weight").mul_(128**0.5)  # theirs does not divide scores by sqrt(d)
    return _alike(ours, theirs, torch.randint(1024, (1, 512)), None, lambda x: theirs(x, use_cache=False).logits)


@pair("skim-attention", "transformers LayoutLMEmbeddings and torch nn.MultiheadAttention", "(2, 512, 768), 12 heads",
      "Skimformer, one layer")  # fmt: skip
def _skim() -> Sides:
    layoutlm = _models("transformers.models.layoutlm.modeling_layoutlm")
    config = layoutlm.LayoutLMConfig(hidden_size=768, num_attention_heads=12, hidden_dropout_prob=0.0)
    theirs = nn.ModuleDict(
        {"embed": layoutlm.LayoutLMEmbeddings(config), "attend": nn.MultiheadAttention(768, 12, batch_first=True)}
    )
    ours = registry.create("skim-attention", dim=768, heads=12)
    for text in ("word", "position", "token_type"):
        nn.init.zeros_(getattr(theirs["embed"], f"{text}_embeddings").weight).requires_grad_(False)
    names = {f"embed.{name}_embeddings": "" for name in ("word", "position", "token_type")}
    names |= {f"embed.{name}_position_embeddings": f"layout.tables.{name}" for name in ("x", "y", "h", "w")}
    names |= {"attend.in_proj_weight": "q.weight k.weight v.weight", "attend.in_proj_bias": "q.bias k.bias v.bias"}
    names |= {"embed.LayerNorm": "layout.norm", "attend.out_proj": "out"}
    _load(ours, theirs, names)
    corner, size = torch.randint(0, 800, (2, 512, 2)), torch.randint(1, 200, (2, 512, 2))
    boxes, none = torch.cat([corner, corner + size], -1), torch.zeros(2, 512, dtype=torch.long)

    def read(x: Tensor) -> Tensor:
        where = theirs["embed"](none, boxes)
        return theirs["attend"](where, where, x, need_weights=False)[0]

    return _alike(ours, theirs, _input(2, 512, 768), lambda x: ours(x, boxes=boxes), read)


# Recurrences, linear attention and slots ----------------------------------------------------------------------------
@pair(
    "mambamixer", "transformers MambaMixer", "(1, 196, 192), 16 states, causal", "14 x 14 tokens; along the tokens only"
)
def _mamba() -> Sides:
    module = _models("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(hidden_size=192, state_size=16, num_hidden_layers=1)
    theirs, ours = module.MambaMixer(config, layer_idx=0), registry.create("mambamixer", dim=192, channels=False)
    own = {"in_proj": "token.in_proj", "out_proj": "token.out_proj", "A_log": "token.scans.0.A_log"}
    own |= {"D": "token.scans.0.D"} | {n: f"token.scans.0.{n}" for n in ("conv1d", "x_proj", "dt_proj")}
    # The scan the other way is not called.
    others = {n: t for n, t in ours.state_dict().items() if "scans.1" in n or n == "alpha"}
    _load(ours, theirs, own, **others)
    return _alike(ours, theirs, _input(1, 196, 192), lambda x: ours(x, causal=True))


@pair("lightning-attention", "transformers MiniMaxLightningAttention", "(1, 4096, 1024), 8 heads of 128, causal",
      "TransNormerLLM-385M")  # fmt: skip
def _lightning() -> Sides:
    # Theirs has SiLU on values too, a sigmoid on the gate and a scale in the norm.
    module = _models("transformers.models.minimax.modeling_minimax")
    config = module.MiniMaxConfig(
        hidden_size=1024, num_attention_heads=8, head_dim=128, num_hidden_layers=2, num_key_value_heads=8
    )
    theirs, x = module.MiniMaxLightningAttention(config, 0), _input(1, 4096, 1024)
    ours = registry.create("lightning-attention", dim=1024, heads=8)
    return Side(ours, x, lambda x: ours(x, causal=True)), Side(theirs, x, lambda x: theirs(x, None, None)[0]), None


@pair("efficient-attention", "linear-attention-transformer SelfAttention", "(2, 64 x 64, 256), 8 heads",
      "a map of a ResNet-50, stage 2 at 256")  # fmt: skip
def _efficient() -> Sides:
    package = _package("linear_attention_transformer.linear_attention_transformer", "linear-attention-transformer")
    theirs, ours = package.SelfAttention(256, 8), registry.create("efficient-attention", dim=256, heads=8, bias=False)
    theirs.to_out.bias.requires_grad_(False).zero_()
    _load(ours, theirs, {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.bias": "", "to_out": "out"})
    with torch.no_grad():
        ours.out.weight.mul_(32**-0.5)  # theirs scales its queries
    return _alike(ours, theirs, _input(2, 4096, 256))


@pair("agent-attention", "agent-attention-pytorch AgentSelfAttention", "(8, 196, 384), 6 heads, 49 agents",
      "Agent-DeiT-S at 224")  # fmt: skip
def _agent() -> Sides:
    # Theirs is given its agents; ours pools them from the queries and adds a convolution of the values.
    ours = registry.create("agent-attention", dim=384, heads=6, agents=49)
    theirs = _package("agent_attention_pytorch.agent_transformer", "agent-attention-pytorch").AgentSelfAttention(
        384, num_agent_tokens=49, heads=6, talking_heads=False, gate=False
    )
    theirs.norm, agents, x = nn.Identity(), _input(8, 49, 384), _input(8, 196, 384)
    return (
        Side(ours, x, lambda x: ours(x, grid=(14, 14))),
        Side(theirs, x, lambda x: theirs(x, agent_tokens=agents)),
        None,
    )


@pair("mega", "mega-pytorch MegaLayer", "(4, 1024, 160), z 96, v 320, 16 modes", "Mega on LRA images")
def _mega() -> Sides:
    # Theirs averages the future without weights of its own and has no relative bias for values.
    ours = registry.create("mega", dim=160, ema_dim=16, z_dim=96, v_dim=320)
    theirs = _package("mega_pytorch.mega_pytorch", "mega-pytorch").MegaLayer(
        dim=160, ema_heads=16, attn_dim_qk=96, attn_dim_value=320, causal=False
    )
    x = _input(4, 1024, 160)
    return Side(ours, x, ours), Side(theirs, x, theirs), None


@pair("routing-transformer", "routing-transformer SelfAttention", "(1, 4096, 512), 8 heads, 4 local, 16 clusters",
      "the paper's halves of local and routing heads")  # fmt: skip
def _routing() -> Sides:
    # Theirs takes the queries and keys of largest similarity without the norm, and updates centroids in training.
    ours = registry.create("routing-transformer", dim=512, heads=8, clusters=16, window=256)
    theirs = _package("routing_transformer.routing_transformer", "routing-transformer").SelfAttention(
        512, 1, 4096, 8, 4, 256
    )
    x = _input(1, 4096, 512)
    return Side(ours, x, ours), Side(theirs, x, lambda x: theirs(x)[0]), None


@pair("slot-attention", "slot-attention SlotAttention", "(8, 128 x 128, 64), 7 slots, 3 rounds", "the paper, CLEVR")
def _slots() -> Sides:
    theirs = _package("slot_attention", "slot-attention").SlotAttention(num_slots=7, dim=64, iters=3, hidden_dim=128)
    ours = registry.create("slot-attention", dim=64, slots=7, iterations=3, mlp_hidden=128)
    names = {"slots_mu": "mean", "slots_logsigma": "log_deviation", "norm_input": "norm_context"}
    names |= {"to_q": "q", "to_k": "k", "to_v": "v", "norm_pre_ff": "norm_mlp", "fc1": "mlp.0", "fc2": "mlp.2"}
    for name in ("to_q", "to_k", "to_v"):  # the paper has no biases
        getattr(theirs, name).bias.requires_grad_(False).zero_()
        names[f"{name}.bias"] = ""
    _load(ours, theirs, names | {"mlp.0": "mlp.0", "mlp.2": "mlp.2"})
    x = _input(8, 128 * 128, 64)

    def seeded(module: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        torch.manual_seed(0)  # both draw the same slots
        return module(z)

    return _alike(ours, theirs, x, lambda z: seeded(lambda z: ours(None, z), z), lambda z: seeded(theirs, z))


@pair("dual-attention-transformer", "dual-attention DualAttention", "(2, 512, 512), 4 + 4 heads, 8 relations, causal",
      "the paper, language")  # fmt: skip
def _dual() -> Sides:
    package = _package("dual_attention.dual_attention", "dual-attention")
    ours = registry.create(
        "dual-attention-transformer", dim=512, heads=8, relational=4, relations=8, symbols="relative", max_distance=64
    )
    theirs = package.DualAttention(
        512, 4, 4, dropout=0.0, ra_kwargs={"n_relations": 8, "use_relative_positional_symbols": True}
    )
    sensory, related = theirs.self_attention, theirs.relational_attention
    with torch.no_grad():
        for mine, parts in (
            (ours.q, (sensory.wq.weight, related.wq_attn.weight)),
            (ours.k, (sensory.wk.weight, related.wk_attn.weight)),
            (ours.v, (sensory.wv.weight,)),
            (ours.out_sensory, (sensory.wo.weight,)),
            (ours.q_related, (related.wq_rel.weight,)),
            (ours.k_related, (related.wk_rel.weight,)),
            (ours.w_s, (related.wv.weight,)),
            (ours.out_relational, (related.wo.weight,)),
        ):
            mine.weight.copy_(torch.cat(parts))
        ours.w_r.copy_(related.wr)
    distance = (torch.arange(512) - torch.arange(512)[:, None]).clamp(-64, 64) + 64
    return _alike(
        ours,
        theirs,
        _input(2, 512, 512),
        lambda x: ours(x, causal=True),
        lambda x: theirs(x, ours.symbols.library[distance], is_causal=True)[0],
    )


# Taking the figures -------------------------------------------------------------------------------------------------
def measure(pair: Pair, device: str = "cpu", seconds: float = 5.0) -> Compared:
    """The ratio of a pair.

    Raises:
        CrosslightError: a package is missing, or the outputs differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device(device):
            ours, theirs, as_ours = pair.build()
        if as_ours is not None:
            with torch.no_grad():
                y, other = ours.forward(ours.x), as_ours(theirs.forward(theirs.x))
            difference = float((y - other).abs().max() / other.abs().max()) if y.shape == other.shape else float("nan")
            if not difference < TOLERANCE:
                raise CrosslightError(f"the outputs differ by {difference:.1e} of the largest")
        calls = {"ours": ours, "theirs": theirs}
        for call in (*calls.values(), *calls.values()):
            timing.once(call, device)
        taken = timing.interleaved(calls, rounds=7, seconds=seconds, device=device)
    rounds = len(taken["ours"].rounds)
    detail = ", ".join(f"{name} {1e3 * t.median:.4g} ms" for name, t in taken.items()) + f", {rounds} rounds"
    return _compared(pair, taken["ours"].ratio(taken["theirs"]), detail, as_ours is not None)


def take(
    device: str = "cpu",
    started: Callable[[str], None] = lambda name: None,
    *,
    rows: Sequence[str] = (),
    seconds: float = 5.0,
) -> Iterator[Compared]:
    """The figures of all pairs, or of those of ``rows``, one after the other."""
    for each in PAIRS:
        if rows and each.row not in rows:
            continue
        started(each.name)
        try:
            yield measure(each, device, seconds)
        except (CrosslightError, RuntimeError, ImportError, AttributeError) as error:
            yield _compared(each, None, str(error).strip().partition("\n")[0], False)


def _compared(pair: Pair, value: float | None, detail: str, equal: bool) -> Compared:
    return Compared(pair.name, "at most", 1.0, value, "×", detail, pair.row, pair.other, pair.shape, pair.source, equal)


def files(root: Path, device: str, taken: Sequence[Compared]) -> dict[Path, str]:
    """What to write where: bench/public.json, and this device's part of docs/performance.md."""
    return written(root, "public", device, taken, _section)


def _section(kind: str, where: str, taken: Sequence[Compared]) -> str:
    lines = [
        f"## Beside public implementations, on {'a CPU' if kind == 'cpu' else 'a GPU'}",
        "",
        f"{where} Forward + backward in float32, as a multiple of their time, to be at most "
        "1: medians over pairs of calls that took turns. Weights are the same and outputs were equal, but where only "
        "sizes are said to be alike.",
        "",
        "| row | beside | shape | from | times theirs | |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {c.row} | {c.other} | {c.shape} | {c.source} | {c.shown} | {_note(c)} |" for c in taken),
    ]
    return "\n".join(lines)


def _note(c: Compared) -> str:
    if c.value is None:
        return c.detail.replace("|", "\\|")
    return ", ".join(["missed"] * (not c.holds) + ["sizes alike"] * (not c.equal))
