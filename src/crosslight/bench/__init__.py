"""Time, memory and FLOPs against length: growth exponents and the length from which a method pays."""

from crosslight.bench.calls import Setting, parse_mask
from crosslight.bench.curves import Crossing, efficiency_length, growth
from crosslight.bench.machine import machine
from crosslight.bench.sweep import Measurement, Summary, record, summarise, sweep

__all__ = [
    "Crossing",
    "Measurement",
    "Setting",
    "Summary",
    "efficiency_length",
    "growth",
    "machine",
    "parse_mask",
    "record",
    "summarise",
    "sweep",
]
