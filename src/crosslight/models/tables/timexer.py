"""TimeXer: a forecaster whose series reads exogenous series through one global token.

Wang, Wu, Dong, Qin, Zhang, Liu, Qiu, Wang, Long, "TimeXer: Empowering Transformers for Time Series Forecasting with
Exogenous Variables", 2024, arXiv 2402.19072.

The endogenous series x (batch, T) and each exogenous series z_c (batch, T_ex) are normalised by their own mean and
standard deviation. Tokens of width d:

    P = W_p patches(x) + position          (batch, T / p, d)      non-overlapping patches of length p
    G                                      (batch, 1, d)          a learned global token
    V_c = W_v z_c + b_v                    (batch, C, d)          a whole exogenous series is one token

A layer, where LN is LayerNorm:

    [P ; G] <- LN([P ; G] + SelfAttention([P ; G]))
    G       <- LN(G + CrossAttention(query G, keys and values V))
    [P ; G] <- LN([P ; G] + FFN([P ; G]))

The forecast is a linear map of all tokens of the last layer, de-normalised with the mean and deviation of x. With
several ``channels`` (multivariate mode) each is endogenous in turn, with patches and a global token of its own, and all
of them are the variates that the global tokens read.

Beside plain attention: only the global token reads the exogenous series, which may have another length than x; the
patches learn of them from the global token in the next layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from crosslight.cards import Card, Evidence
from crosslight.errors import CrosslightError, expect
from crosslight.fusion.base import mechanism
from crosslight.registry import register

if TYPE_CHECKING:
    from jaxtyping import Float

    Series = Float[Tensor, "batch time channels"]
    Variates = Float[Tensor, "batch variates dim"]
    Tokens = Float[Tensor, "folded tokens dim"]

CARD = Card(
    id="timexer",
    kind="model",
    group="tables",
    title="TimeXer: Empowering Transformers for Time Series Forecasting with Exogenous Variables",
    year=2024,
    paper="2402.19072",
    code="thuml/TimeXer",
    summary="Forecasts a series from its patches and one global token, which alone attends to exogenous series as "
    "whole-series tokens.",
    cost="n^2",
    checked="a restatement with torch.nn.MultiheadAttention and the same weights; the parameter counts of the released "
    "code; the exact invariants of instance "
    "normalisation, of the order of variates, and of what one layer lets exogenous series reach",
    differs="Calendar marks are read un-normalised and the forecast comes from one more LayerNorm, as in the released "
    "code. Dropout acts on embeddings, attention outputs and the FFN, but not on attention weights and not on the "
    "forecast.",
    evidence=Evidence(
        claim="A series that follows exogenous series is forecast better with exogenous tokens than without",
        task="driven-series",
        metric="mse",
        margin=0.2,
        baseline="timexer",
        baseline_options={"exogenous_len": None},
    ),
)


class _Layer(nn.Module):
    """Tokens (batch * channels, patches + 1, dim), the global token last; variates (batch, C, dim) or None."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        dropout: float,
        reads: bool,
        attention: str,
        options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        how: dict[str, Any] = {"dim": dim, "heads": heads, "options": options}
        self.attend = mechanism(attention, pattern="noncausal-self", **how)
        self.read = mechanism(attention, pattern="noncausal-cross", **how) if reads else None
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), self.dropout, nn.Linear(hidden, dim), self.dropout)

    def forward(self, tokens: Tokens, variates: Variates | None) -> Tokens:
        tokens = self.norms[0](tokens + self.dropout(self.attend(tokens)))
        patches, token = tokens[:, :-1], tokens[:, -1:]
        if self.read is not None and variates is not None:
            # The global tokens of an example's channels are the queries of one attention.
            asking = token.reshape(len(variates), -1, token.shape[2])
            token = token + self.dropout(self.read(asking, variates)).view_as(token)
        tokens = torch.cat([patches, self.norms[1](token)], 1)
        return self.norms[2](tokens + self.mlp(tokens))


def _sinusoid(length: int, dim: int) -> Float[Tensor, "length dim"]:
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]


def _normalised(series: Series) -> tuple[Series, Series, Series]:
    """The series with mean 0 and deviation 1 over time, and the mean and deviation that undo it."""
    mean = series.mean(1, keepdim=True).detach()
    centred = series - mean
    deviation = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation, mean, deviation


def _preset(seq_len, horizon, patch_len, exogenous_len, **width):
    lengths = {"seq_len": seq_len, "horizon": horizon, "patch_len": patch_len, "exogenous_len": exogenous_len}
    return lengths | width


@register(CARD)
class TimeXer(nn.Module):
    """Series (batch, seq_len, channels) and exogenous series (batch, length, variates) -> (batch, horizon, channels).

    Args:
        seq_len, horizon: steps that are seen and forecast; seq_len is a multiple of ``patch_len``.
        channels: endogenous series; with more than one, each also reads the others (multivariate mode).
        exogenous_len: length of the exogenous series, or one length for each group of them; None: there are none.
        normalise: instance normalisation of every series.
        attention: the mechanism of self- and cross-attention, with ``attention_options``.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _preset(48, 12, 12, 48, dim=32, heads=4, depth=2, hidden=64),
        # Electricity price forecasting, from a week of hours to a day, as the released scripts set it.
        "epf_np": _preset(168, 24, 24, 168, dim=512, heads=8, depth=3, hidden=512),
        "epf_pjm": _preset(168, 24, 24, 168, dim=512, heads=8, depth=3, hidden=2048),
        "epf_be": _preset(168, 24, 24, 168, dim=512, heads=8, depth=2, hidden=512),
        "epf_fr": _preset(168, 24, 24, 168, dim=512, heads=8, depth=2, hidden=2048),
        "epf_de": _preset(168, 24, 24, 168, dim=512, heads=8, depth=1, hidden=2048),
        # Seven channels that read one another.
        "etth1_96": _preset(96, 96, 16, None, channels=7, dim=256, heads=8, depth=1, hidden=2048),
    }
    #: Parameters, as the released code (Time-Series-Library) builds these settings.
    published: ClassVar[dict[str, int]] = {
        "epf_np": 8_087_576,
        "epf_pjm": 12_810_776,
        "epf_be": 5_457_944,
        "epf_fr": 8_606_744,
        "epf_de": 4_402_712,
        "etth1_96": 1_782_112,
    }

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        patch_len: int = 16,
        channels: int = 1,
        exogenous_len: int | Sequence[int] | None = None,
        dim: int = 512,
        heads: int = 8,
        depth: int = 2,
        hidden: int = 2048,
        dropout: float = 0.1,
        normalise: bool = True,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        expect(seq_len % patch_len == 0, "seq_len", seq_len, f"a multiple of patch_len = {patch_len}")
        lengths = [exogenous_len] if isinstance(exogenous_len, int) else list(exogenous_len or ())
        self.lengths = ([seq_len] if channels > 1 else []) + lengths
        self.seq_len, self.horizon, self.patch_len, self.channels = seq_len, horizon, patch_len, channels
        self.normalise = normalise
        self.patch = nn.Linear(patch_len, dim, bias=False)
        self.register_buffer("position", _sinusoid(seq_len // patch_len, dim), persistent=False)
        self.global_token = nn.Parameter(torch.randn(channels, 1, dim))
        self.variate = nn.ModuleList(nn.Linear(length, dim) for length in self.lengths)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Layer(dim, heads, hidden, dropout, bool(self.lengths), attention, attention_options) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear((seq_len // patch_len + 1) * dim, horizon)

    @classmethod
    def sample(cls, **options: Any) -> tuple[TimeXer, dict[str, Tensor]]:
        """A small model built with ``options`` over the row's own, and random input for it (batch 2)."""
        model = cls(**{**cls.presets["tiny"], "dim": 16, "heads": 2, "hidden": 32, **options})
        inputs = {"series": torch.randn(2, model.seq_len, model.channels)}
        own = model.lengths[1:] if model.channels > 1 else model.lengths
        if own:
            inputs["exogenous"] = torch.randn(2, own[0], 3)
        return model, inputs

    def forward(
        self,
        series: Series,
        exogenous: Series | Sequence[Series] | None = None,
        marks: Series | None = None,
    ) -> Series:
        """Forecast.

        Args:
            series: (batch, seq_len, channels).
            exogenous: (batch, exogenous_len, any number of variates), or one such tensor for each group.
            marks: calendar features, further variates of the first group, which are not normalised.

        Returns:
            (batch, horizon, channels), in the units of ``series``.
        """
        _check("series", series, self.seq_len)
        expect(series.shape[2] == self.channels, "series", f"{series.shape[2]} channels", f"{self.channels}")
        x, mean, deviation = _normalised(series) if self.normalise else (series, 0.0, 1.0)
        tokens = self.encode(x, self._groups(series, exogenous, marks))
        forecast = self.head(tokens.flatten(1)).unflatten(0, (-1, self.channels)).transpose(1, 2)
        return forecast * deviation + mean

    def encode(self, x: Series, groups: Sequence[Series]) -> Tokens:
        """The tokens after the last layer, (batch * channels, patches + 1, dim), the global token last, of a
        normalised series and groups of normalised exogenous series."""
        patches = self.patch(x.transpose(1, 2).unflatten(-1, (-1, self.patch_len))) + self.position
        tokens = torch.cat([patches, self.global_token.expand(len(x), -1, -1, -1)], 2).flatten(0, 1)
        tokens, variates = self.dropout(tokens), None
        if groups:
            embedded = [embed(z.transpose(1, 2)) for embed, z in zip(self.variate, groups, strict=True)]
            variates = self.dropout(torch.cat(embedded, 1))
        for layer in self.layers:
            tokens = layer(tokens, variates)
        return self.norm(tokens)

    def _groups(
        self, series: Series, exogenous: Series | Sequence[Series] | None, marks: Series | None
    ) -> list[Series]:
        """The exogenous series in groups of one length, normalised; marks join the first one as they are."""
        given = [exogenous] if isinstance(exogenous, Tensor) else list(exogenous or ())
        groups = ([series] if self.channels > 1 else []) + given
        own = len(self.lengths) - len(groups) + len(given)
        expect(
            len(groups) == len(self.lengths), "exogenous", f"{len(given)} tensors", f"{own}, one for each exogenous_len"
        )
        for z, length in zip(groups, self.lengths, strict=True):
            _check("exogenous", z, length)
            expect(len(z) == len(series), "exogenous", f"batch {len(z)}", f"batch {len(series)} as series")
        if self.normalise:
            groups = [_normalised(z)[0] for z in groups]
        if marks is not None:
            expect(bool(groups), "marks", "a tensor", "None: there are no exogenous series that they could join")
            _check("marks", marks, self.lengths[0])
            groups[0] = torch.cat([groups[0], marks], 2)
        return groups


def _check(name: str, series: Any, length: int) -> None:
    if not isinstance(series, Tensor) or series.dim() != 3 or series.shape[1] != length:
        got = tuple(series.shape) if isinstance(series, Tensor) else type(series).__name__
        raise CrosslightError(f"{name}: got {got}, expected (batch, {length}, channels)")
