"""Parity with the rules of the official LXMERT explanation generator, stated again from its published logic.

The maps are taken by hooks on the dropout that follows each softmax, so that nothing is shared with `crosslight.hosts`.
"""

import pytest
import torch

import crosslight

transformers = pytest.importorskip("transformers")

TEXT, IMAGE = 7, 4


def bar(attention):
    return (attention.grad * attention).clamp(min=0).mean(1)


def normalised(r):
    eye = torch.eye(r.shape[-1], dtype=r.dtype)
    return (r - eye) / (r - eye).sum(-1, keepdim=True) + eye


def generate(model, maps):
    """R_tt and R_ti, layer by layer; the last layer's image side has no way to the text output and is left out."""
    encoder = model.encoder
    tt, ii = torch.eye(TEXT, dtype=torch.float64)[None], torch.eye(IMAGE, dtype=torch.float64)[None]
    ti, it = torch.zeros(1, TEXT, IMAGE, dtype=torch.float64), torch.zeros(1, IMAGE, TEXT, dtype=torch.float64)

    def of(attention, call=0):
        return bar(maps[attention.dropout][call])

    for layer in encoder.layer:
        a = of(layer.attention.self)
        tt, ti = tt + a @ tt, ti + a @ ti
    for layer in encoder.r_layers:
        a = of(layer.attention.self)
        ii, it = ii + a @ ii, it + a @ it
    for number, layer in enumerate(encoder.x_layers):
        last = number == len(encoder.x_layers) - 1
        a = of(layer.visual_attention.att, 0)
        more_ti, more_tt = normalised(tt).mT @ a @ normalised(ii), a @ it
        if not last:
            b = of(layer.visual_attention.att, 1)
            more_it, more_ii = normalised(ii).mT @ b @ normalised(tt), b @ ti
            it, ii = it + more_it, ii + more_ii
        ti, tt = ti + more_ti, tt + more_tt
        a = of(layer.lang_self_att.self)
        tt, ti = tt + a @ tt, ti + a @ ti
        if not last:
            b = of(layer.visn_self_att.self)
            ii, it = ii + b @ ii, it + b @ it
    return tt - torch.eye(TEXT, dtype=torch.float64), ti


def test_parity_with_the_official_rules_on_lxmert():
    config = transformers.LxmertConfig(
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
    model = transformers.LxmertModel(config).eval().double()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    inputs = {
        "input_ids": torch.randint(3, 50, (1, TEXT)),
        "visual_feats": torch.randn(1, IMAGE, 6, dtype=torch.float64),
        "visual_pos": torch.rand(1, IMAGE, 4, dtype=torch.float64),
    }

    def target(out):
        return out.pooled_output[:, 3]

    maps = {}

    def keep(module, args):
        args[0].retain_grad()
        maps.setdefault(module, []).append(args[0])

    hooks = [
        m.dropout.register_forward_pre_hook(keep) for m in model.modules() if type(m).__name__ == "LxmertAttention"
    ]
    target(model(**inputs)).sum().backward()
    for hook in hooks:
        hook.remove()
    expected_tt, expected_ti = generate(model, maps)

    text, image = "stream 0", "stream 1"
    reading = crosslight.explain.relevance(model, inputs, target, stream=text)
    torch.testing.assert_close(reading.pairs[text, text], expected_tt, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(reading.pairs[text, image], expected_ti, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(reading.scores[image], expected_ti[:, 0], rtol=1e-5, atol=1e-12)
    assert expected_ti[:, 0].abs().max() > 0
