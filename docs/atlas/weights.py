"""The `weights` picture of a row: its maps on the example, and what one pixel reads as an image."""

from __future__ import annotations

from functools import cache
from html import escape

from torch import Tensor

from atlas import colours, example
from atlas.example import QUERY, SIDE, Look
from atlas.text import NAMES, short

#: Kinds whose rows have the contract of kind token.
KINDS = ("token", "system")
SHOWN = 4

Files = dict[str, bytes]


def section(id: str) -> str:
    """HTML and Markdown of the picture; `files` are the images it shows."""
    try:
        looks = example.looks(id)
    except NotImplementedError as error:
        return f"No picture: this row has no matrix of queries by keys. {error}".rstrip()
    call = ", ".join([f'"{id}"', *(f"{name}={value!r}" for name, value in example.options(id).items())])
    signed = any(look.signed for look in looks)
    return "\n".join(
        [
            "What an untrained layer (seed 0) reads when the 64 pixels of a digit are its tokens, line by line. "
            + _asks(looks[0]),
            "",
            f'<div class="look">{"".join(_maps(id, look) for look in looks)}'
            f"{''.join(_readings(id, look) for look in looks)}</div>",
            "",
            _legend(signed),
            "",
            f"Built as `crosslight.create({call})`.",
        ]
    )


@cache
def files(id: str) -> Files:
    """The PNG files of a row by name; none where it has no matrix."""
    try:
        looks = example.looks(id)
    except NotImplementedError:
        return {}
    return {
        name: colours.picture(values)
        for look in looks
        for name, _, values in [*_matrices(look), *_rows(look)]
        if values.any()
    }


@cache
def shared() -> Files:
    """Images that all pages show."""
    return {
        "digit.png": colours.grey(example.digit()),
        "scale.png": colours.scale(signed=False),
        "scale-signed.png": colours.scale(signed=True),
    }


def thumbnail(id: str) -> str | None:
    """Name of the picture that stands for a row."""
    return next(iter(files(id)), None)


def _asks(look: Look) -> str:
    if look.weights.shape[1] == SIDE * SIDE:
        return "Each pixel asks (a row of a map) and reads pixels (its columns). Green marks one pixel, and its row."
    return "Learned queries ask (the rows of a map) and read pixels (its columns)."


def _legend(signed: bool) -> str:
    name = "scale-signed.png" if signed else "scale.png"
    ends = ("largest, negative", "largest") if signed else ("0", "largest")
    return (
        f'<p class="look-scale"><span>{ends[0]}</span><img src="../{name}" alt=""><span>{ends[1]}</span></p>\n\n'
        "Lightness grows with the square root of a weight; under a map stand the weights of its colours, and larger "
        "ones are as bright as the brightest."
        + (" This row has negative weights: cool colours." if signed else "")
        + " A map that does not start at 0 is nearly even, and its colours run evenly from its least weight on."
    )


Part = tuple[str, str, Tensor]


def _chosen(look: Look) -> list[int]:
    count = look.weights.shape[0]
    return [] if count == 1 else sorted({i * count // SHOWN for i in range(SHOWN)})


def _head(look: Look, i: int) -> str:
    count = look.weights.shape[0]
    return f"head {i + 1}" if count <= example.HEADS else f"matrix {i + 1} of {count}"


def _matrices(look: Look) -> list[Part]:
    """(file name, caption, matrix): the mean and then some heads."""
    count = look.weights.shape[0]
    mean = (f"{look.pattern}.png", f"mean of {count}" if count > 1 else "its one map", look.weights.mean(0))
    return [mean, *((f"{look.pattern}-{i}.png", _head(look, i), look.weights[i]) for i in _chosen(look))]


def _rows(look: Look) -> list[Part]:
    """(file name, caption, 8 x 8): what one pixel reads in the mean and in each head, or what each query does."""
    n = look.weights.shape[1]
    mean = look.weights.mean(0).view(n, SIDE, SIDE)
    if 1 < n < SIDE * SIDE:
        return [(f"{look.pattern}-query-{i}.png", f"query {i + 1}", mean[i]) for i in range(min(n, 2 * SHOWN))]
    query = QUERY if n > 1 else 0
    heads = [
        (f"{look.pattern}-reads-{i}.png", _head(look, i), look.weights[i, query].view(SIDE, SIDE))
        for i in _chosen(look)
    ]
    return [(f"{look.pattern}-reads.png", "the mean" if heads else "what it reads", mean[query]), *heads]


def _maps(id: str, look: Look) -> str:
    mean, *others = _matrices(look)
    big, heads = _tile(id, look, mean, "map", _row_mark(look)), [_tile(id, look, part, "map") for part in others]
    return f'<section><p class="look-title">{NAMES[look.pattern]}</p>{big}{_tiles(heads)}</section>'


def _readings(id: str, look: Look) -> str:
    one = look.weights.shape[1] in (1, SIDE * SIDE)
    parts = [_tile(id, look, part, "reading", _mark(look)) for part in _rows(look)]
    digit = _figure("../digit.png", "the example: a three of 8 by 8 pixels", "the example", "reading", _mark(look))
    title = "What one pixel reads" if _mark(look) else "What it reads" if one else "What each query reads"
    title += ", causal" if look.pattern.startswith("causal") else ""
    first = [digit, *parts[:1]] if one else [digit]
    rest = parts[1:] if one else parts
    return (
        f'<section><p class="look-title">{title}</p><div class="look-pair">{"".join(first)}'
        f"</div>{_tiles(rest)}</section>"
    )


def _tiles(figures: list[str]) -> str:
    return f'<div class="look-tiles">{"".join(figures)}</div>' if figures else ""


def _mark(look: Look) -> str:
    """The outline of the pixel that asks."""
    if look.weights.shape[1] != SIDE * SIDE:
        return ""
    y, x = divmod(QUERY, SIDE)
    return f'<i style="left:{100 * x / SIDE}%;top:{100 * y / SIDE}%;width:{100 / SIDE}%;height:{100 / SIDE}%"></i>'


def _tile(id: str, look: Look, part: Part, kind: str, mark: str = "") -> str:
    name, caption, values = part
    what = "reading as an image" if kind == "reading" else "map"
    alt = f"{id}, {NAMES[look.pattern]}, {caption}: {what}"
    if not values.any():
        return _figure("", alt, f"{caption}: nothing", kind)
    low, high = colours.span(values)
    range = f"± {short(high)}" if values.min() < 0 else f"{short(low)} to {short(high)}"
    return _figure(name, alt, f"{caption}<small>{range}</small>", kind, mark, len(values))


def _row_mark(look: Look) -> str:
    """The outline of its row."""
    n = look.weights.shape[1]
    if n != SIDE * SIDE:
        return ""
    return f'<i style="left:0;top:{100 * QUERY / n:.3f}%;width:100%;height:{100 / n:.3f}%"></i>'


def _figure(source: str, alt: str, caption: str, kind: str, mark: str = "", lines: int = SIDE) -> str:
    """``caption`` is HTML. A map of few queries is drawn with lines high enough to see."""
    columns = SIDE * SIDE if kind == "map" else SIDE
    ratio = f"{columns}/{max(lines, columns // 4)}"
    image = f'<img src="{source}" alt="{escape(alt)}" loading="lazy">' if source else ""
    return (
        f'<figure><div class="look-frame" style="aspect-ratio:{ratio}">{image}{mark}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
