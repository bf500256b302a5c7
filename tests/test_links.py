"""The documentation points at what exists: targets of links, and files that commands name."""

import re
from pathlib import Path

import pytest

from support.repository import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "projects/*/README.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")
COMMAND = re.compile(
    r"(?:python|--config-file|CONFIG=)[\s\\]*((?:configs|projects|tools)/[\w./-]+\.(?:py|yaml))\b"
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_to_files(page: Path):
    targets = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert [t for t in targets if not (ROOT / page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_in_commands_exist(page: Path):
    names = COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists()] == []
