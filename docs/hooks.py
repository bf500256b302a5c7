"""Hooks of MkDocs: READMEs are pages too, and links between files lead to pages."""

import re
from os.path import dirname, relpath
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Links and images in Markdown whose target is a relative path.
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the READMEs: that of the repository as the first page, and one for each project."""
    readmes = {"index.md": ROOT / "README.md"}
    for path in sorted(ROOT.glob("projects/*/README.md")):
        readmes[f"projects/{path.parent.name}.md"] = path
    for uri, path in readmes.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages; those to files that are no pages become text."""
    pages = {Path(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    source = Path(page.file.abs_src_path)

    def rewrite(link: re.Match) -> str:
        image, text, path, anchor = link.groups(default="")
        target = (source.parent / path).resolve()
        if target in pages:
            uri = relpath(pages[target], dirname(page.file.src_uri))
            return f"{image}[{text}]({uri}{anchor})"
        # What is not there at all stays, and MkDocs complains of it.
        return text if target.exists() else link[0]

    return LINK.sub(rewrite, markdown)
