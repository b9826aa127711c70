"""The models of docs/physics.md: their code runs, and prints what its comments say."""

import re

import pytest
from support import ROOT

PAGE = (ROOT / "docs" / "physics.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Other lattices and models\n")[2].partition("\n## ")[0]
CODE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=["lattices", "strings"])
def test_prints_what_it_says(code, capsys):
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print\(.*\)(?:  # (.*))?$", code, re.MULTILINE)
    assert len(printed) == len(said) > 3
    for actual, expected in zip(printed, said, strict=True):
        if re.fullmatch(r"-?\d+\.\d+", expected):
            digits = len(expected.partition(".")[2])
            assert float(actual) == pytest.approx(float(expected), abs=0.6 * 10.0**-digits)
        elif expected:
            assert actual == expected
