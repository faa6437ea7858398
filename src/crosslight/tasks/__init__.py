"""Tasks: data, a model around an entrant, a loss and a metric. A task is found by its name when it is asked for."""

from crosslight.tasks.base import Batch, Entrant, Size, Task, find, get, names, task

__all__ = ["Batch", "Entrant", "Size", "Task", "find", "get", "names", "task"]
