"""Shared by all tests: one thread (tests run in parallel) and a torchvision that imports without its C operators."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="for test_conformance.py and test_accelerator.py: cpu, cuda")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """test_accelerator.py needs one; None leaves the rest to pytest."""
    on_cpu = config.getoption("--device") == "cpu"
    return True if on_cpu and collection_path.name == "test_accelerator.py" else None


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


_operators = []


def _define_torchvision_operators() -> None:
    """A CPU-only torch has no matching torchvision build; timm and transformers only need it to import."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        import sys

        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
            library.define(f"{name}() -> ()")
            library.define(f"_{name}_backward() -> ()")
        _operators.append(library)


_define_torchvision_operators()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
