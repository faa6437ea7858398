"""Comparing entrants on tasks under one budget: trials, their store, leaderboards and the report."""

from crosslight.comparison.leaderboard import leaderboard
from crosslight.comparison.study import compare

__all__ = ["compare", "leaderboard"]
