"""Every code block of README, CONTRIBUTING and docs runs: Python blocks of a page in order and in one namespace, shell
blocks line by line, with budgets cut down where a command would train."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from crosslight import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

#: Appended to commands that would otherwise take minutes; an option that is given twice takes its last value.
QUICK = {
    "compare": ["--steps", "2", "--seeds", "1", "--workers", "1"],
    "bench": ["--lengths", "64,128", "--rounds", "1", "--dim", "64"],
}
#: Lines that are not ours to run: they install, build or run this very suite.
OURS_BUT_LONG = ("crosslight index", "crosslight verify", "crosslight new")
ELSEWHERE = ("make ", "pip ", "pre-commit ", ".venv/bin/", "git ", *OURS_BUT_LONG)


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, lang, code in found if lang in languages]


def named(pages: list[Path]) -> list[object]:
    return [pytest.param(p, id=p.name) for p in pages]


@pytest.mark.parametrize("page", named([p for p in PAGES if blocks(p, "python")]))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample_files(tmp_path)
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # torch.compile looks a function's module up
    registry.load_all()  # a module registers once, when it is first imported: not into the copy
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # a page's own card stays on the page
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), module.__dict__)


def commands() -> list[tuple[str, str]]:
    lines = [
        (page.name, line.strip())
        for page in PAGES
        for block in blocks(page, "sh", "bash", "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize(("page", "line"), [c for c in commands() if not c[1].startswith(ELSEWHERE)])
def test_shell_lines_run(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crosslight.cli import main

    words = shlex.split(line, comments=True)
    assert words[0] == "crosslight", f"{page}: {line!r} is neither ours nor known"
    monkeypatch.chdir(tmp_path)
    sample_files(tmp_path)
    monkeypatch.setattr("sys.argv", [*words, *QUICK.get(words[1], [])])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code in (0, None), line


@pytest.mark.parametrize("line", sorted({line for _, line in commands() if line.startswith("make ")}))
def test_make_targets_exist(line: str) -> None:
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert line.split()[1] in targets


def test_no_block_is_of_an_unknown_language() -> None:
    known = {"python", "sh", "text", "json"}
    for page in PAGES:
        languages = {lang for _, lang, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
        assert languages <= known, f"{page.name}: {languages - known} would not run"


def sample_files(folder: Path) -> None:
    """The files that the pages use as the reader's own."""
    hours = 600
    g = torch.Generator().manual_seed(0)
    load = torch.sin(torch.arange(hours) / 4) + 0.1 * torch.randn(hours, generator=g)
    price = torch.roll(load, 3) + 0.1 * torch.randn(hours, generator=g)
    rows = [f"2026-01-{1 + h // 24:02d} {h % 24:02d}:00:00,{load[h]:.4f},{price[h]:.4f}" for h in range(hours)]
    (folder / "prices.csv").write_text("date,load,price\n" + "\n".join(rows) + "\n")
    (folder / "notes.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
