"""Maps as small PNG files, in the colours of the HTML report: lightness grows with the square root of a weight, warm
for positive weights and cool for negative ones, on a dark ground in both themes."""

from __future__ import annotations

import math
import struct
import zlib
from functools import cache

from torch import Tensor

LEVELS = 127
#: Hue and chroma along each ramp, from the ground to the brightest.
WARM = ((285, 300, 345, 385, 415, 458), (0.035, 0.13, 0.185, 0.175, 0.15, 0.09))
COOL = ((285, 270, 250, 225, 200, 185), (0.035, 0.11, 0.13, 0.125, 0.11, 0.06))


def span(values: Tensor) -> tuple[float, float]:
    """The weights that are drawn darkest and brightest.

    The brightest is not the largest: single weights of 1 (the first rows of a causal map) would leave all else dark,
    and a map that reads everything alike has nothing to be bright. The darkest is zero, except in a map that is nearly
    even, whose differences would not show.
    """
    sizes = values.abs().flatten()
    nonzero = sizes[sizes > 0].sort().values
    if not len(nonzero):
        return 0.0, 1.0
    low, high = values.min().item(), nonzero[int(0.985 * (len(nonzero) - 1))].item()
    if low > 0.1 * high and high - low > 1e-3 * high:
        return low, high
    return 0.0, max(high, 4 * sizes.mean().item())


def picture(values: Tensor) -> bytes:
    """A PNG with a pixel for each value of a matrix."""
    low, high = span(values)
    size = ((values.abs() - low) / (high - low)).clamp(0, 1)
    size = size if low else size.sqrt()
    levels = (values.sign() * size * LEVELS).round().int() + LEVELS
    return png(levels.tolist(), palette())


def grey(values: Tensor) -> bytes:
    return png((255 * values / values.max()).round().int().tolist(), bytes(v for v in range(256) for _ in range(3)))


def scale(signed: bool) -> bytes:
    """The colours in the order of the weights, evenly spaced in the weight."""
    weights = [i / LEVELS for i in range(-LEVELS if signed else 0, LEVELS + 1)]
    return png([[LEVELS + round(math.copysign(abs(w) ** 0.5, w) * LEVELS) for w in weights]], palette())


def png(rows: list[list[int]], colours: bytes) -> bytes:
    """Rows of palette indices as a PNG file, with the colours that it uses."""
    used = sorted({i for row in rows for i in row})
    place = {old: new for new, old in enumerate(used)}
    colours = b"".join(colours[3 * i : 3 * i + 3] for i in used)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes(place[i] for i in row) for row in rows), 9)
    parts = chunk(b"IHDR", header) + chunk(b"PLTE", colours) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@cache
def palette() -> bytes:
    """Colours from the most negative weight over zero, at ``LEVELS``, to the most positive."""
    cool, warm = ([_colour(i / LEVELS, *ramp) for i in range(LEVELS + 1)] for ramp in (COOL, WARM))
    return b"".join([*reversed(cool), *warm[1:]])


def _colour(t: float, hues: tuple[float, ...], chroma: tuple[float, ...]) -> bytes:
    """sRGB of the OKLCH colour at ``t`` along a ramp."""
    light, c, h = 0.155 + 0.815 * t, _along(chroma, t), math.radians(_along(hues, t))
    a, b = c * math.cos(h), c * math.sin(h)
    l3, m3, s3 = (
        (light + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (light - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (light - 0.0894841775 * a - 1.291485548 * b) ** 3,
    )
    linear = (
        4.0767416621 * l3 - 3.3077115913 * m3 + 0.2309699292 * s3,
        -1.2684380046 * l3 + 2.6097574011 * m3 - 0.3413193965 * s3,
        -0.0041960863 * l3 - 0.7034186147 * m3 + 1.707614701 * s3,
    )
    encoded = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in linear)
    return bytes(round(255 * min(1.0, max(0.0, x))) for x in encoded)


def _along(stops: tuple[float, ...], t: float) -> float:
    i = min(int(t * (len(stops) - 1)), len(stops) - 2)
    return stops[i] + (stops[i + 1] - stops[i]) * (t * (len(stops) - 1) - i)
