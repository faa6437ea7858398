"""Kind explain: readings of what attends to what. Each is a few lines on `crosslight.hosts`.

>>> reading = crosslight.explain.relevance(model, inputs, target=lambda out: out.logits[:, 3])  # doctest: +SKIP
>>> reading.scores["decoder"], reading.plot()  # doctest: +SKIP
"""

from crosslight.explain.base import Reading
from crosslight.explain.chefer_mm_explain import relevance
from crosslight.explain.sixteen_heads import head_importance

__all__ = ["Reading", "head_importance", "relevance"]
