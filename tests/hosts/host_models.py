"""Small random models of every host, with inputs and a way to their output tensor."""

import pytest
import torch
from torch import nn

import crosslight.attention.softmax  # noqa: F401  (registers)

IDS = torch.tensor([[7, 12, 30, 4, 9, 21, 40], [5, 8, 3, 17, 33, 20, 11]])
KEEP = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "attention_dropout": 0.0,
}
TEXT = SMALL | {
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _transformers():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def bert():
    t = _transformers()
    return t.BertModel(t.BertConfig(**TEXT)), {"input_ids": IDS, "attention_mask": KEEP}


def llama():
    t = _transformers()
    config = t.LlamaConfig(**TEXT, num_key_value_heads=1)
    return t.LlamaForCausalLM(config), {"input_ids": IDS, "attention_mask": KEEP.flip(1)}


def llama_flag():
    """Without padding, so that the mask is a flag."""
    return llama()[0], {"input_ids": IDS}


def bart():
    t = _transformers()
    config = t.BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=20,
        forced_eos_token_id=2,
    )
    return t.BartModel(config), {"input_ids": IDS, "attention_mask": KEEP, "decoder_input_ids": IDS[:, :5]}


def t5():
    t = _transformers()
    config = t.T5Config(vocab_size=50, d_model=16, d_kv=8, num_heads=2, num_layers=2, d_ff=32)
    return t.T5Model(config), {"input_ids": IDS, "attention_mask": KEEP, "decoder_input_ids": IDS[:, :5]}


def vit():
    t = _transformers()
    return t.ViTModel(t.ViTConfig(**SMALL, image_size=16, patch_size=8)), {"pixel_values": torch.randn(2, 3, 16, 16)}


def clip():
    t = _transformers()
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    config = t.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)
    return t.CLIPModel(config), {"input_ids": IDS, "attention_mask": KEEP, "pixel_values": torch.randn(2, 3, 16, 16)}


def lxmert():
    """Forms its attention matrices itself, by softmax."""
    t = _transformers()
    config = t.LxmertConfig(
        vocab_size=50,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        l_layers=2,
        x_layers=2,
        r_layers=2,
        visual_feat_dim=6,
        visual_pos_dim=4,
    )
    visual = {"visual_feats": torch.randn(2, 4, 6), "visual_pos": torch.rand(2, 4, 4)}
    return t.LxmertModel(config), {"input_ids": IDS, "attention_mask": KEEP} | visual


def timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4)
    return model, {"x": torch.randn(2, 3, 16, 16)}


def timm_eva():
    """Rotary positions."""
    timm = pytest.importorskip("timm")
    model = timm.models.Eva(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4, use_rot_pos_emb=True
    )
    return model, {"x": torch.randn(2, 3, 16, 16)}


def timm_swin():
    """Position biases, and window masks in the shifted blocks."""
    timm = pytest.importorskip("timm")
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=4
    )
    return model, {"x": torch.randn(2, 3, 32, 32)}


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return model, {
        "sample": torch.randn(2, 2, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": KEEP[:, 2:],
    }


def sd3():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=2,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([3, 4]),
    }


def torch_transformer():
    """Encoder (with its fused path and nested tensors) and decoder of PyTorch, with padding."""
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    padding = KEEP == 0
    return model, {
        "src": source,
        "tgt": target,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "tgt_is_causal": True,
    }


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        import crosslight

        self.first = crosslight.create("softmax", dim=16, heads=2, position="alibi")
        self.cross = crosslight.create("softmax", dim=16, heads=2, kv_heads=1, context_dim=12)

    def forward(self, x, z, keep):
        x = x + self.first(x, causal=True)
        return x + self.cross(x, context=z, mask=keep)


def own():
    return Own(), {"x": torch.randn(2, 6, 16), "z": torch.randn(2, 5, 12), "keep": KEEP[:, 2:].bool()}


class Handwritten(nn.Module):
    """As in nanoGPT."""

    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = 2, 16
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def handwritten():
    return nn.Sequential(Handwritten(), Handwritten()), {"input": torch.randn(2, 6, 16)}


ALL = {
    f.__name__: f
    for f in (
        bert,
        llama,
        llama_flag,
        bart,
        t5,
        vit,
        clip,
        lxmert,
        timm_vit,
        timm_eva,
        timm_swin,
        unet,
        sd3,
        torch_transformer,
        own,
        handwritten,
    )
}


def make(name):
    model, inputs = ALL[name]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:  # as they come, some hosts attend almost evenly
                weight.normal_(std=0.3)
    return model.eval(), inputs


def cast(inputs, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def run(model, inputs):
    """The floating point output."""
    made = model(**inputs)
    return made if isinstance(made, torch.Tensor) else made[0]
