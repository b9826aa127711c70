"""README and docs: their code runs as a reader meets it, their links lead somewhere."""

import ast
import os
import re
import subprocess
import sys
from itertools import takewhile

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import facts

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_of(page):
    """Return the Python of a page, with what else there is left as empty lines: errors name it."""
    lines, inside, indent = [], False, 0
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside and line.endswith("```python")
            indent, line = line.index("`"), ""
        lines.append(line[indent:] if inside else "")
    return "\n".join(lines)


def run(page, names, printed=lambda: ""):
    """Run the code of a page, and compare what it prints with the lines of comments below it."""
    code = code_of(page)
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        exec(compile(ast.Module([statement], []), str(page), "exec"), names)
        said = takewhile(lambda line: line.startswith("# "), lines[statement.end_lineno :])
        if (out := printed()) and (expected := [line[2:] for line in said]):
            assert_alike(out.splitlines(), expected)


def assert_alike(lines, expected):
    """Check that lines are those of a page; a decimal may differ by one in its last place."""
    assert len(lines) == len(expected)
    for words, others in zip(map(str.split, lines), map(str.split, expected), strict=True):
        assert len(words) == len(others)
        for word, other in zip(words, others, strict=True):
            if re.fullmatch(r"\d+\.\d{3}", word):
                assert float(word) == pytest.approx(float(other), abs=1.1e-3)
            else:
                assert word == other


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    if not code_of(page).strip():
        assert "```python" not in page.read_text(encoding="utf-8")
        return
    if page.name == "design.md":  # it asks for a process in which nothing is imported yet
        if sys.platform == "linux":
            paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests/emulators"]))
            command = [sys.executable, "-c", code_of(page)]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
        return
    monkeypatch.chdir(tmp_path)  # some save a file
    if page.name == "mlx_lm.md":
        pytest.importorskip("mlx_lm", reason="it wants Python 3.11")
        from tiny_models import save_dense

        (tmp_path / "path/to/model").mkdir(parents=True)
        save_dense("qwen3", tmp_path / "path/to/model")
    run(page, {"__name__": "page"}, lambda: capsys.readouterr().out)


def test_the_readme_prints_what_it_says(capsys):
    run(ROOT / "README.md", {})
    printed = capsys.readouterr().out
    assert "(200, 32, 32)" in printed
    assert "density 0.75 there" in printed


def test_the_readme_stays_one_page():
    assert README.count("\n") < 120
    assert README.count("![") == 1
    assert README.count("```python") == 1


def test_its_facts_are_the_measured_ones():
    assert facts.MARK[0] + facts.table() + facts.MARK[1] in README


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pictures_are_described(page):
    for words in re.findall(r"!\[([^\]]*)\]", page.read_text(encoding="utf-8")):
        assert len(words) > 20, words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_number_is_left_to_be_filled_in(page):
    assert not re.search(r"TODO|TBD|\?\?\?|COMPAT", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda page: page.name
)
def test_densities_are_fractions_as_the_functions_take_them(page):
    """``density=10`` is refused: what a reader copies out of a table is 0.1."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"density,? [\d.]+ ?%|\d% density|B = \d+,( density)? [\d.]+%", text)
    for head, rows in re.findall(r"^(\|.*\|)\n\|[ :|-]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        names = [name.strip() for name in head.split("|")]
        if "density" in names:
            cells = [row.split("|")[names.index("density")] for row in rows.splitlines()]
            assert "%" not in "".join(cells), head
