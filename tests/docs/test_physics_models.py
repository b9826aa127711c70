"""Models and evolutions of docs/physics.md: code runs, and prints what its comments say."""

import re

import pytest
from support import ROOT

PAGE = (ROOT / "docs" / "physics.md").read_text(encoding="utf-8")
SECTIONS = ("Other lattices and models", "Evolution, gradients and units")
CODE = [
    code
    for title in SECTIONS
    for section in [PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]]
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


@pytest.mark.parametrize("code", CODE, ids=["lattices", "strings", "evolution"])
def test_prints_what_it_says(code, capsys):
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print\(.*\)(?:  # (.*))?$", code, re.MULTILINE)
    assert len(printed) == len(said) > 2
    for actual, expected in zip(printed, said, strict=True):
        if re.fullmatch(r"-?\d+\.\d+", expected):
            digits = len(expected.partition(".")[2])
            assert float(actual) == pytest.approx(float(expected), abs=0.6 * 10.0**-digits)
        elif expected:
            assert actual == expected
