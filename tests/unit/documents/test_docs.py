"""docs/: the config reference is that of the code, every page is in the site, every link leads to a file."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import yaml

from homodistil.config.schema import RunConfig

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launcher").rglob("*.md")]
_HISTORY = {"LOG.md", "CHANGELOG.md"}
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def test_the_config_reference_is_up_to_date():
    render = runpy.run_path(str(ROOT / "docs" / "generate_config.py"))["render"]
    assert render() == (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), (
        "docs/config.md is stale; run: python docs/generate_config.py"
    )


def test_the_table_of_families_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "generate_families.py"))["page"]
    assert (ROOT / "docs" / "families.md").read_text() == page(), (
        "docs/families.md is stale; run: python docs/generate_families.py"
    )


def test_the_config_reference_describes_every_field():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\S+)` \|.*\| (.+) \|$", page, re.MULTILINE))
    config = RunConfig()
    names = [
        f"{s.name}.{f.name}" for s in dataclasses.fields(config) for f in dataclasses.fields(getattr(config, s.name))
    ]
    assert list(rows) == names
    assert all(len(text) > 10 for text in rows.values())


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"[\w./-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert pages >= {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document):
    targets = [match[0] for match in _LINK.findall(_CODE.sub("", document.read_text(encoding="utf-8")))]
    assert not [target for target in targets if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name not in _HISTORY], ids=lambda path: path.name)
def test_every_module_that_is_named_exists(document):
    names = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", document.read_text(encoding="utf-8"))
    modules = [name for name in names if name.endswith(".py") or name.startswith("homodistil/")]
    assert not [name for name in modules if not any((base / name).exists() for base in (ROOT, ROOT / "homodistil"))]


def test_the_front_page_is_short():
    assert 120 <= len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_pictures_are_small():
    assert all(path.stat().st_size < 100_000 for path in (ROOT / "docs" / "figures").glob("*.svg"))
