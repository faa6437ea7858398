"""What every explanation gives: scores by stream or by site, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crosslight import registry
from crosslight.errors import require

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Reading:
    """Scores of an explanation.

    Attributes:
        scores: by stream, (batch, tokens), or by site, (heads,). Higher means that it mattered more.
        pairs: relevance of the second stream's tokens for those of the first, (batch, n, m), where there is one.
        unit: what the scores count: "token" or "head".
    """

    scores: dict[str, Float[Tensor, "..."]]
    pairs: dict[tuple[str, str], Float[Tensor, "batch n m"]] = field(default_factory=dict)
    unit: str = "token"

    def plot(self, labels: Mapping[str, Sequence[str]] | None = None, sample: int = 0) -> Any:
        """Bars of the scores, a panel for each stream or site, as a plotly figure.

        Args:
            labels: names of the tokens of a stream.
            sample: which example of the batch.
        """
        subplots = require("plotly.subplots", "report")
        figure = subplots.make_subplots(rows=len(self.scores), cols=1, subplot_titles=list(self.scores))
        for row, (name, scores) in enumerate(self.scores.items(), 1):
            values = (scores[sample] if scores.dim() > 1 else scores).detach().float().cpu().tolist()
            names = (labels or {}).get(name) or [f"{self.unit} {i}" for i in range(len(values))]
            # Positions, not names, on the axis: two tokens may read alike.
            figure.add_bar(x=list(range(len(values))), y=values, customdata=names, row=row, col=1, name=name)
            figure.update_xaxes(tickvals=list(range(len(values))), ticktext=list(names), row=row, col=1)
        figure.update_traces(hovertemplate="%{customdata}: %{y:.4g}<extra></extra>")
        figure.update_layout(showlegend=False, height=120 + 200 * len(self.scores))
        return figure


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output for one input, a tuple of inputs, or a mapping of named inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


Target = Callable[[Any], Tensor]


def small_host() -> tuple[nn.Module, Tensor]:
    """Two attention layers of our own and an input, for the samples of rows."""
    layers = (registry.create("softmax", dim=16, heads=2) for _ in range(2))
    return nn.Sequential(*layers).eval(), torch.randn(2, 5, 16)
