"""Every registered system holds the contract of its kind: one test for each row and check.

On another device: ``pytest tests/test_conformance.py --device cuda``.
"""

import functools

import pytest

from crosslight import registry, testing


@functools.cache
def cases():
    registry.load_all()
    return [(id, name) for id in registry.ids() for name, _ in testing.checks(registry.factory(id)[0].card)]


@pytest.mark.parametrize(("id", "check"), cases())
def test_conforms(id, check, device):
    (outcome,) = testing.check(id, only=check, device=device)
    if outcome.result == "skipped":
        pytest.skip(outcome.why)
