"""A hook of MkDocs: the pages outside docs/ join the site, and links that lead out of docs/ work there as on GitHub."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", **{name: name for name in ("README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")}}
LINK = re.compile(r'\[([^\[\]]*)\]\(([^()\s#:]+)(#[^()\s]*)?\)|(src|href)="([^"#:]+)"')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and every file outside docs/ that a page links to."""
    for name, address in PAGES.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / name)))
    linked = {
        address: path
        for page in files.documentation_pages()
        for link in LINK.finditer(page.content_string)
        for path, address in [_place(page, link)]
        if address is not None and files.get_file_from_path(address) is None and path.is_file()
    }
    for address, path in linked.items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their targets are on the site; those to folders outside docs/ become their text."""

    def rewritten(link: re.Match[str]) -> str:
        _, address = _place(page.file, link)
        text, _, anchor, attribute, _ = link.groups()
        if address is None:
            return text
        address = os.path.relpath(address, Path(page.file.src_uri).parent)
        return f'{attribute}="{address}"' if attribute else f"[{text}]({address}{anchor or ''})"

    return LINK.sub(rewritten, markdown)


def _place(page: File, link: re.Match[str]) -> tuple[Path, str | None]:
    """The file that a link leads to, and its address on the site (None: a folder outside docs/, which has none)."""
    path = (Path(page.abs_src_path or "").parent / (link[2] or link[5])).resolve()
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return path, None
    return path, PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"source/{name}")
