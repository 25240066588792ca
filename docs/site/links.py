"""A hook of mkdocs: the site has two pages that lie at the top of the repository, and links to and from them hold."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FROM_THE_TOP = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for name, page in FROM_THE_TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns paths of the repository, as its own readers follow them, into paths of the site."""
    path = page.file.src_uri
    if path in FROM_THE_TOP.values():
        markdown = markdown.replace("](docs/", "](").replace("](README.md)", "](index.md)")
    up = "../" * path.count("/")
    for name, target in FROM_THE_TOP.items():
        markdown = re.sub(rf"\]\((?:{up}\.\./)?{re.escape(name)}\b", f"]({up}{target}", markdown)
    return markdown
