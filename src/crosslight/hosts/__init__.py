"""Seeing, steering and swapping attention inside any host.

>>> with crosslight.watch(model) as seen:  # doctest: +SKIP
...     model(**inputs)
>>> seen["decoder.layers.0.encoder_attn"]  # (batch, heads, n, m)  # doctest: +SKIP

>>> with crosslight.steer(model, rule, where="*.cross_attn"):  # doctest: +SKIP
...     model(**inputs)

>>> crosslight.swap(model, "performer", where="*encoder*")  # doctest: +SKIP

Hosts are our own mechanisms, transformers, timm, diffusers, ``torch.nn.MultiheadAttention``, and modules that call
``scaled_dot_product_attention`` themselves.
"""

from __future__ import annotations

from crosslight.hosts.base import Call, Rule, Site
from crosslight.hosts.find import sites
from crosslight.hosts.inserting import insert
from crosslight.hosts.steering import steer
from crosslight.hosts.swapping import Swap, swap
from crosslight.hosts.watching import Seen, watch

__all__ = ["Call", "Rule", "Seen", "Site", "Swap", "insert", "sites", "steer", "swap", "watch"]
