"""What mkdocs asks of us: pages that are made from the code and the results, and links of the repository as the site
has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import catalogue
import home
import lessons
import links
import measured
import reference
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pymdownx.superfences import fence_code_format

carried: set[str] = set()
DIAGRAMS = Path(sys.prefix) / "package/dist/mermaid.min.js"


def on_config(config: Any) -> Any:
    """The catalogue's pages take the place of its name in the navigation, group by group; diagrams are fences of their
    own kind."""
    fence = {"name": "mermaid", "class": "diagram", "format": fence_code_format}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    config.nav = [_filled(entry, catalogue.navigation()) for entry in config.nav]
    return config


def _filled(entry: Any, pages: list[Any]) -> Any:
    if isinstance(entry, dict):
        return {name: pages if value == catalogue.FOLDER else _filled(value, pages) for name, value in entry.items()}
    return [_filled(each, pages) for each in entry] if isinstance(entry, list) else entry


def on_files(files: Any, config: Any) -> Any:
    """Add what is not in docs/: pages of the repository, generated pages, pictures, and files that pages link to."""
    if missing := reference.undocumented():
        raise PluginError(f"public names without a docstring: {', '.join(missing)}")
    drawn = catalogue.pictures(Path(config.site_dir).parent / "site-pictures")
    made = {page: (links.ROOT / path).read_text() for path, page in links.BROUGHT.items()}
    made |= catalogue.pages(set(drawn)) | lessons.pages()
    made |= {home.PAGE: home.page(), measured.PAGE: measured.page()}
    made |= {reference.CLI: reference.command_line(), reference.API: reference.python()}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for name, path in drawn.items():
        files.append(File.generated(config, f"{catalogue.FOLDER}/{name}.webp", abs_src_path=str(path)))
    if DIAGRAMS.is_file():  # where npm was there when the environment was made; without it diagrams stay text
        files.append(File.generated(config, "assets/mermaid.min.js", abs_src_path=str(DIAGRAMS)))
    carried.clear()
    for file in files.documentation_pages():
        carried.update(links.rewrite(file.content_string, file.src_uri)[1])
    for path in sorted(carried):
        files.append(File.generated(config, f"{links.FILES}/{path}", abs_src_path=str(links.ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return links.rewrite(markdown, page.file.src_uri)[0]
