"""The conformance suite: hold a system, registered or your own, to the contract of its kind.

>>> import crosslight
>>> crosslight.testing.check("softmax")  # doctest: +SKIP
>>> crosslight.testing.check(MyAttention)  # a Core or Mechanism class with a card  # doctest: +SKIP
"""

from crosslight.testing.suite import ConformanceError, Maker, Outcome, Report, Skip, check, checks

__all__ = ["ConformanceError", "Maker", "Outcome", "Report", "Skip", "check", "checks"]
