"""Hooks of the site: pages of the repository's root, files that pages link to, notebooks, hover texts, and the version."""

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fedveil import __version__

ROOT = Path(__file__).parents[1]
# Pages beside docs/, each with its name on the site.
TOP_PAGES = {
    "README.md": "index.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
}
FILES = "files"  # folder of the site with what pages link to elsewhere in the repository
FOLDER = re.compile(r"\[([^\]]*)\]\((?!https?:)[^)\s#]+/\)")  # of the repository, which is no page
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
# Words of the glossary that also have their everyday meaning in a sentence: they get no hover text.
EVERYDAY = frozenset(
    [
        "act",
        "answer",
        "choice",
        "close",
        "commit",
        "head",
        "link",
        "look",
        "order",
        "own",
        "model",
        "plan",
        "policy",
        "receipt",
        "reserve",
        "row",
        "settings",
        "share",
        "task",
    ]
)
WORD = re.compile(r"^\| ([a-z][a-z ,-]+) \| (.+) \|$", re.MULTILINE)  # a row of the glossary


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the version below each page."""
    config.copyright = f"fedveil {__version__}, Apache-2.0"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, notebooks as pages, and the files that pages link to."""
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        files.append(File.generated(config, _on_site(path), content=notebook_page(path)))
    for name in TOP_PAGES:
        files.append(File.generated(config, _on_site(ROOT / name), abs_src_path=str(ROOT / name)))
    pages = [ROOT / name for name in TOP_PAGES] + list((ROOT / "docs").rglob("*.md"))
    linked = {target for page in pages for target in _targets(page) if _on_site(target).startswith(FILES)}
    for path in sorted(path for path in linked if path.is_file()):
        files.append(File.generated(config, _on_site(path), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links lead to the site, with the glossary's words for hover texts."""
    source = ROOT / next(
        (name for name, uri in TOP_PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}"
    )
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        if not target.is_file():
            return link[0]  # mkdocs says what is wrong with it
        return posixpath.relpath(_on_site(target), here or ".") + (link[2] or "")

    text = "".join(
        part if at % 2 else LINK.sub(moved, FOLDER.sub(r"\1", part))
        for at, part in enumerate(_parts(markdown))
    )
    return text if page.file.src_uri == "glossary.md" else f"{text}\n\n{_hover_texts()}\n"


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: texts, code, what was printed, and pictures."""
    parts: list[str] = []
    for cell in json.loads(path.read_text())["cells"]:
        body = "".join(cell["source"])
        parts.append(body if cell["cell_type"] == "markdown" else f"```python\n{body}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if picture := "".join(data.get("image/svg+xml", ())):
                encoded = base64.b64encode(picture.encode()).decode()
                parts.append(f"![Output](data:image/svg+xml;base64,{encoded})")
            elif lines := output.get("text") or data.get("text/plain") or ():
                parts.append(f"```text\n{''.join(lines).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _on_site(path: Path) -> str:
    """Return the name on the site of a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name in TOP_PAGES:
        return TOP_PAGES[name]
    if not name.startswith("docs/"):
        return f"{FILES}/{name}"
    return name.removeprefix("docs/") + (".md" if path.suffix == ".ipynb" else "")


def _targets(page: Path) -> Iterator[Path]:
    """Yield the files within the repository to which a page links."""
    for part in _parts(page.read_text())[::2]:
        for link in LINK.finditer(part):
            target = (page.parent / link[1]).resolve()
            if target.is_relative_to(ROOT):
                yield target


def _parts(markdown: str) -> list[str]:
    """Return a page in parts: text, fenced block, text, and so on."""
    return re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)


@cache
def _hover_texts() -> str:
    """Return the glossary as abbreviations, each word with its first sentence as plain text."""
    rows = WORD.findall((ROOT / "docs" / "glossary.md").read_text())
    plain = [(word, re.sub(r"[`*]|\]\([^)]*\)|\[", "", text)) for word, text in rows]
    named = ((each, text) for words, text in plain for each in words.split(", "))
    return "\n".join(f"*[{each}]: {text}" for each, text in named if each not in EVERYDAY)
