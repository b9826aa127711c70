"""Check the site as it was built: ``python docs/site/check.py site``.

Every public name has its place on a page, every link within the site leads to a page and a place
that are there, every picture is there and described, and no page loads anything from elsewhere.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api_pages

LOADED = {"img": "src", "script": "src", "iframe": "src"}


class Page(HTMLParser):
    """What a page links to, loads and names."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if name := values.get("id"):
            self.ids.add(name)
        if tag == "a" and (target := values.get("href")):
            self.links.append(target)
        if tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loads.append(values.get("href") or "")
        if tag in LOADED and (target := values.get(LOADED[tag])):
            self.loads.append(target)
        if tag == "img":
            self.pictures.append(values)


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a site, a sentence each."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for target in page.links + page.loads:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads:
                    found.append(f"{name} loads {target} from elsewhere")
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not to.exists():
                found.append(f"{name} links to {target}, which is not there")
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].ids:
                found.append(f"{name} links to {target}: the page has no such place")
        for picture in page.pictures:
            if len(picture.get("alt") or "") < 4:
                found.append(f"{name}: {picture.get('src')} is not described")
    ids = set().union(*(page.ids for page in pages.values()))
    missing = [name for name in api_pages.public_names() if name not in ids]
    return found + [f"{name} has no place on a page" for name in missing]


def main() -> None:
    folder = Path(sys.argv[1])
    found = problems(folder)
    for line in found:
        print(line, file=sys.stderr)
    if found:
        sys.exit(1)
    pages = len(list(folder.rglob("*.html")))
    print(f"{pages} pages, {len(api_pages.public_names())} public names")


if __name__ == "__main__":
    main()
