"""Spelling a function's name from its docstring, over the functions of the running Python's standard library.

The encoder reads the first bytes of the docstring's first paragraph, and the decoder spells the name byte by byte.
Functions of one file in ten are held out.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from crosslight.tasks import data
from crosslight.tasks.base import Size, Task, task
from crosslight.tasks.trunk import EncoderDecoder

PAD, START, END = 0, 1, 2


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions in the order of the source; expressions, most of a tree, hold none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _functions(child)


@cache
def pairs(held_out: bool) -> tuple[tuple[str, str], ...]:
    """(docstring, name) of every documented function, without repetition, in the order of the sources."""
    found: dict[tuple[str, str], None] = {}
    for path in data.sources(held_out):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
        for node in _functions(tree):
            if not node.name.startswith("__"):
                doc = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if doc:
                    found[doc, node.name] = None
    return tuple(found)


def encode(text: str, length: int, *, start: bool = False) -> list[int]:
    """Bytes of the text, padded to ``length``; with ``start`` between a start and an end."""
    tokens = list(text.encode())
    tokens = [START, *tokens[: length - 2], END] if start else tokens[:length]
    return tokens + [PAD] * (length - len(tokens))


@task
class Spelling(Task):
    """Spell a function's name while reading its docstring."""

    name = "spelling"
    pattern = "causal-cross"
    metric = "bits_per_char"
    higher_is_better = False
    size = Size(dim=64, heads=4, depth=2)
    steps = 300
    batch_size = 32
    lr = 5e-3

    def __init__(self, source: int = 48, target: int = 24) -> None:
        self.source, self.target = source, target

    @cache  # noqa: B019 - a task lives as long as its trial
    def _tokens(self, held_out: bool) -> tuple[Tensor, Tensor]:
        both = pairs(held_out)
        source = torch.tensor([encode(doc, self.source) for doc, _ in both])
        return source, torch.tensor([encode(name, self.target + 1, start=True) for _, name in both])

    def batches(self, seed, batch_size):
        source, target = self._tokens(False)
        for index in data.shuffled(len(source), batch_size, seed):
            yield {"source": source[index], "target": target[index]}

    def model(self, entrant, size):
        return EncoderDecoder(entrant, size, 256, self.source, self.target)

    def loss(self, model, batch):
        source, target = batch["source"], batch["target"]
        logits = model(source, target[:, :-1], source != PAD)
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)

    def evaluate(self, model):
        device = next(model.parameters()).device
        source, target = (t.to(device) for t in self._tokens(True))
        total, count = 0.0, 0
        for s, t in zip(source.split(128), target.split(128), strict=True):
            characters = int((t[:, 1:] != PAD).sum())
            total += self.loss(model, {"source": s, "target": t}).item() * characters
            count += characters
        return {"bits_per_char": total / count / math.log(2)}

    def example(self):
        # A short name that its docstring holds: what there is to attend to can be seen.
        docs = [(doc, name) for doc, name in pairs(True) if name in doc[: self.source] and len(doc) > len(name)]
        index = pairs(True).index(docs[0]) if docs else 0
        source, target = self._tokens(True)
        return {"source": source[index : index + 1], "target": target[index : index + 1]}

    def labels(self, example):
        special = {PAD: "", START: "start", END: "end"}
        names = {
            key: [special.get(token, chr(token)) for token in example[key][0].tolist()] for key in ("source", "target")
        }
        return {"rows": names["target"][:-1], "columns": names["source"]}
