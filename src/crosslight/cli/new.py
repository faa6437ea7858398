"""`crosslight new`: the skeleton of a row, which works as plain attention until its equations are changed."""

from __future__ import annotations

import datetime
import json
import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from crosslight import registry
from crosslight.cli import checkout
from crosslight.errors import CrosslightError, expect

#: Kind -> folder of its rows under src/crosslight and under tests.
ROOMS = {"token": "attention"}

TOKEN = Template('''"""$name: plain attention, until its equations are changed to those of the paper.

$title, $year, $paper.

    A = softmax(Q K^T / sqrt(d))          (batch, heads, n, m)
    y = W_o [A_1 V_1 ; ... ; A_h V_h]     (batch, n, dim)

Differs from plain multi-head attention in nothing yet.
"""

from __future__ import annotations

from crosslight.attention.base import Core
from crosslight.cards import Card
from crosslight.engines import dense
from crosslight.registry import register

CARD = Card(
    id="$id",
    kind="token",
    group="$group",
    title="$title",
    year=$year,
    paper="$paper",
    summary="Every query reads every key by softmax.",
    patterns=("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    cost="n^2",
    decode="kv",
    checked="the matrix form, written out",
)


@register(CARD)
class $name(Core):
    """softmax(q k^T / sqrt(d)) v; q (batch, heads, n, d), k and v (batch, heads, m, d)."""

    def forward(self, q, k, v, *, mask=None, causal=False):
        return dense.attend(q, k, v, mask=mask, causal=causal)

    def weights(self, q, k, *, mask=None, causal=False):
        return dense.weights(q, k, mask=mask, causal=causal)
''')

TOKEN_TEST = Template('''"""What holds for $id beyond the conformance suite."""

import torch

import crosslight
from crosslight.attention.$module import $name


def test_conforms():
    crosslight.testing.check("$id")


def test_equals_its_equations():
    q, k, v = torch.randn(3, 2, 4, 10, 8, dtype=torch.float64).unbind()
    expected = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close($name(heads=4, head_dim=8)(q, k, v), expected)
''')


def _values(id: str, title: str | None, year: int | None, paper: str, group: str) -> dict[str, str]:
    """What the templates take; text is escaped for the string literals it lands in."""
    expect(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", id) is not None, "id", repr(id), "such as 'my-attention'")
    module = id.replace("-", "_")
    expect(not keyword.iskeyword(module), "id", repr(id), "an id whose file can be imported")
    expect(id not in registry.ids(), "id", repr(id), "an id that is not taken (`crosslight show` has it)")
    name = "".join(part.capitalize() for part in id.split("-"))
    title = name if title is None else title
    year = datetime.date.today().year if year is None else year
    quoted = {
        k: json.dumps(v, ensure_ascii=False)[1:-1] for k, v in (("title", title), ("paper", paper), ("group", group))
    }
    return {"id": id, "module": module, "name": name, "year": str(year), **quoted}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CrosslightError(f"id: got {path.stem!r}, expected one whose file does not exist: {path}") from None


def new(
    id: Annotated[str, typer.Argument(help="Lower case with hyphens, such as 'my-attention'; also names the file.")],
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(ROOMS)}.")] = "token",
    title: Annotated[str | None, typer.Option(help="Title of the paper.")] = None,
    year: Annotated[int | None, typer.Option(help="Year of the paper; this year unless given.")] = None,
    paper: Annotated[str, typer.Option(help="arXiv number, DOI or address.")] = "unpublished",
    group: Annotated[str, typer.Option(help="Group of the catalogue, such as 'scores' or 'linear'.")] = "scores",
    root: Annotated[Path | None, typer.Option(help="The checkout to write to; the one in use unless given.")] = None,
) -> None:
    """Write the skeleton of a row, a module and its test, which pass as they are (for contributors)."""
    expect(kind in ROOMS, "--kind", repr(kind), f"one of {', '.join(ROOMS)}")
    expect(root is None or (root / "src/crosslight").is_dir(), "--root", root, "a checkout with src/crosslight in it")
    values = _values(id, title, year, paper, group)
    base = checkout.root() if root is None else root
    module = Path("src/crosslight") / ROOMS[kind] / f"{values['module']}.py"
    test = Path("tests") / ROOMS[kind] / f"test_{values['module']}.py"
    _write(base / module, TOKEN.substitute(values))
    _write(base / test, TOKEN_TEST.substitute(values))
    print(
        f"wrote {module} and {test}\n\n"
        "1. Put the equations of the paper in the docstring and in the class, and correct the card.\n"
        f"2. pytest {test}\n"
        "3. crosslight index\n"
        f"4. crosslight show {id}"
    )
