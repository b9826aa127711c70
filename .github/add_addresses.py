"""Write the address of the repository into pyproject.toml: the release workflow runs this first.

A checkout names no address, and so none that is wrong in a fork. What is published needs one: an
index shows the README without the repository around it, to people who do not have it yet.

  python .github/add_addresses.py https://github.com/OWNER/NAME v1.2.3
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
URLS = """
[project.urls]
Homepage = "{url}"
Documentation = "{url}/tree/{tag}/docs"
Changelog = "{url}/blob/{tag}/CHANGELOG.md"
Issues = "{url}/issues"
"""
LIST = "substitutions = ["
# For the README: pictures and links lead to the repository, and installing begins at the index.
SUBSTITUTIONS = r"""
    { pattern = '(!\[[^\]]*\]\()(?!https?:)', replacement = '\1{url}/raw/{tag}/' },
    { pattern = '(\[[^\]]*\]\()(?!https?:)', replacement = '\1{url}/blob/{tag}/' },
    { pattern = ' \(it is on no package index yet\)', replacement = '' },
    { pattern = 'pip install "\.\[', replacement = 'pip install "mlx-sparse-nn[' },
    { pattern = 'pip install \. ', replacement = 'pip install mlx-sparse-nn ' },"""


def with_addresses(pyproject: str, url: str, tag: str) -> str:
    """Return the text of pyproject.toml with project URLs, and a README whose links are absolute.

    Raises:
        ValueError: it has them already, its hook of the README is another one, or the address or
            the tag has a form that a link cannot take.
    """
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"url must be https://HOST/OWNER/NAME, got {url!r}")
    if not re.fullmatch(r"v[\w.]+", tag):
        raise ValueError(f"tag must be v and a version, got {tag!r}")
    if "[project.urls]" in pyproject or pyproject.count(LIST) != 1:
        raise ValueError(
            "pyproject.toml must have no [project.urls], and one list of substitutions"
        )
    substitutions, urls = (
        text.replace("{url}", url).replace("{tag}", tag) for text in (SUBSTITUTIONS, URLS)
    )
    return pyproject.replace(LIST, LIST + substitutions) + urls


def main() -> None:
    _, url, tag = sys.argv
    text = with_addresses(PYPROJECT.read_text(encoding="utf-8"), url, tag)
    PYPROJECT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
