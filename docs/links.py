"""Checks links that lead nowhere, and makes README's links absolute.

    python docs/links.py build/site          every link within the site, and the relative links of README and the like
    python docs/links.py --absolute [TAG]    prints README with links to the Repository of pyproject.toml, for PyPI

Links to other sites are not followed: ``sphinx-build -b linkcheck`` does that.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
MARKDOWN = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects them."""
        about = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := about.get(key))}
        self.links += [value for key in ("href", "src") if (value := about.get(key))]


def dead_in_site(site: Path) -> Iterator[str]:
    """Links of the built site that lead to no file, or to no anchor in it."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            found = pages.get(target)
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link}: no such file"
            elif anchor and found and anchor not in found.anchors and parts.path != "genindex.html":
                yield f"{path.relative_to(site)}: {link}: no such anchor"


def anchors_of(markdown: str) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_in_markdown(path: Path) -> Iterator[str]:
    """Relative links of a page of Markdown that lead to no file, or to no heading in it."""
    for _, _, link in MARKDOWN.findall(path.read_text()):
        parts = urlsplit(link)
        target = (path.parent / parts.path).resolve() if parts.path else path
        if parts.scheme or parts.netloc:
            continue
        if not target.exists():
            yield f"{path.name}: {link}: no such file"
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in anchors_of(target.read_text()):
            yield f"{path.name}: {link}: no such heading"


def absolute(markdown: str, repository: str, version: str = "main") -> str:
    """Markdown whose relative links lead to a repository.

    >>> absolute("[it](docs/start.md) [x](https://x.org)", "https://example.org/r", "v1")
    '[it](https://example.org/r/blob/v1/docs/start.md) [x](https://x.org)'
    >>> absolute("![picture](docs/a.png)", "https://example.org/r")
    '![picture](https://example.org/r/raw/main/docs/a.png)'
    """

    def one(match: re.Match) -> str:
        picture, text, link = match.groups()
        if not urlsplit(link).scheme and not link.startswith("#"):
            link = f"{repository.rstrip('/')}/{'raw' if picture else 'blob'}/{version}/{link}"
        return f"{picture}[{text}]({link})"

    return MARKDOWN.sub(one, markdown)


def main(arguments: list[str]) -> int:
    """The command line: the exit code."""
    if arguments[:1] == ["--absolute"] and len(arguments) <= 2:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        if not (repository := project.get("urls", {}).get("Repository")):
            print(
                "pyproject.toml has no Repository under [project.urls], to which README's links could lead: add it, "
                'as in Repository = "https://example.org/corm-jax", and commit it, then run this again',
                file=sys.stderr,
            )
            return 1
        print(absolute((ROOT / "README.md").read_text(), repository, *arguments[1:]), end="")
        return 0
    if len(arguments) != 1 or not (Path(arguments[0]) / "index.html").is_file():
        print(
            "usage: python docs/links.py (SITE | --absolute [TAG]), SITE as sphinx-build made it",
            file=sys.stderr,
        )
        return 2
    dead = [*dead_in_site(Path(arguments[0]).resolve())]
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        dead += dead_in_markdown(path)
    print("\n".join(dead) if dead else "no dead link")
    return min(len(dead), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
