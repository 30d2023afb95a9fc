"""Hooks of mkdocs: documents that stand outside docs/ are pages of the site too, under their path in the repository.

In the repository a page of docs/ links to ../LOG.md; in the site, where docs/ is the root, the same page is LOG.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_OUTSIDE = ["LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*"]
_LINK = re.compile(r"(\]\()(\.\./|docs/)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in _OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between docs/ and the rest of the repository, as they are in the site."""
    is_at_root = "/" not in page.file.src_uri
    return _LINK.sub(r"\1", markdown) if is_at_root else markdown
