"""The benchmark of physics: its right results are right, and pages show what was measured."""

import json
import math
import subprocess
import sys
from functools import reduce

import numpy as np
import pytest
import scipy.linalg
from support import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import physics, physics_cases, physics_peers, physics_report
from benchmarks.physics_cases import Case
from benchmarks.report import between

SMALL = [
    Case("lanczos", 6, 5),
    Case("lanczos", 6, 3, "float64"),
    Case("evolve", 6, time=3.0),
    Case("quench", 5, time=2.0, points=7),
    Case("product", 7),
]


def dense(n):
    """Return H of the ring at J = h = 1 by kron, site 0 last."""
    x, z = np.array([[0.0, 1], [1, 0]]), np.diag([-1.0, 1])

    def at(matrix, site):
        return reduce(np.kron, [matrix if s == site else np.eye(2) for s in reversed(range(n))])

    bonds = sum(at(z, i) @ at(z, (i + 1) % n) for i in range(n))
    return -bonds - sum(at(x, i) for i in range(n))


@pytest.mark.parametrize("n", [3, 4, 7])
def test_levels_are_those_of_the_dense_matrix(n):
    every = np.linalg.eigvalsh(dense(n))
    np.testing.assert_allclose(physics_cases.levels(n, 2**n), every, atol=1e-12 * 2**n)


@pytest.mark.parametrize("time", [0.5, 40.0])
def test_evolved_states_are_those_of_the_dense_exponential(time):
    right = scipy.linalg.expm(-1j * time * dense(5))[:, -1]
    np.testing.assert_allclose(physics_cases.evolved(5, time), right, atol=1e-12)


def test_a_curve_is_that_of_evolved_states():
    case = Case("quench", 5, time=2.0, points=3)
    up = physics_cases.spins(5).mean(axis=0)
    right = [up @ np.abs(physics_cases.evolved(5, t)) ** 2 for t in (0.0, 1.0, 2.0)]
    np.testing.assert_allclose(physics_cases.curve(case), right, atol=1e-12)


@pytest.mark.parametrize("name", ["operator", "stored", "scipy"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_solvers_are_judged_right(tmp_path, case, name):
    solver = physics_peers.solver(name, "cpu")
    path = tmp_path / "result.npy"
    prepared = solver.prepare(case.to_json(), str(path))
    assert prepared is not None
    physics_cases.judge(case, np.load(path), physics_cases.expected(case))
    if case.part == "lanczos":
        assert prepared["products"] >= case.k
    assert solver.time(1)["wall"] > 0


def test_a_missing_copy_is_counted():
    case = Case("lanczos", 6, 5, "float64")
    right = physics_cases.levels(6, 8)
    assert right[3] == pytest.approx(right[4])  # a pair
    for found, missed in (([0, 1, 2, 3, 4], 0), ([0, 1, 2, 3, 5], 1)):
        assert physics_cases.judge(case, right[found], right[:5])["missed"] == missed


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        (SMALL[0], lambda a: a + 1e-3, "is no level"),
        (SMALL[0], lambda a: a[:-1], "shape"),
        (SMALL[2], lambda a: a * 1.01, "off by"),
        (SMALL[3], lambda a: a * math.nan, "finite: False"),
        (SMALL[4], lambda a: a + np.eye(128)[3], "1 amplitudes are wrong"),
    ],
)
def test_a_wrong_result_is_refused(case, spoil, message):
    right = physics_cases.expected(case)
    with pytest.raises(ValueError, match=message):
        physics_cases.judge(case, spoil(right), right)


def test_a_run_in_one_command(tmp_path):
    """Solvers have processes; what is missing is said, what was measured before stays."""
    output = tmp_path / "physics.json"
    before = {"case": Case("product", 3).to_json(), "solvers": {}, "commit": "before"}
    output.write_text(json.dumps({"machine": {}, "results": [before]}))
    script = (
        "import sys; from pathlib import Path; from benchmarks import physics\n"
        "found = dict.fromkeys(('operator', 'scipy'), Path(sys.executable))\n"
        "physics.pythons = lambda device: (found, {'qutip': 'no network'})\n"
        "physics.cases = lambda device, quick: [physics.Case('quench', 4, time=1.0, points=3)]\n"
        f"physics.main('cpu', True, ['quench'], Path({str(output)!r}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    kept, measured = json.loads(output.read_text())["results"]
    assert kept == before
    for solver in ("operator", "scipy"):
        found = measured["solvers"][solver]
        assert found["error"] < 1e-4
        assert len(found["cpu"]) == physics.QUICK_TURNS
    assert "QuTiP is missing: no network." in ran.stdout
    assert "| n = 4, 3 points to t = 1 |" in ran.stdout


def test_a_wrong_solver_is_not_timed_and_fails_the_run():
    found = {"operator": {"wrong": "-3 is no level"}, "scipy": {"cpu": [1.0], "wall": [1.0]}}
    results = {"results": [{"case": Case("lanczos", 4).to_json(), "solvers": found}]}
    assert physics_report.wrong(results) == ["lanczos, n = 4: operator: -3 is no level"]
    assert physics_report.ratio(results["results"][0], "operator", "scipy") is None


@pytest.mark.parametrize("mark", physics_report.MARKS)
def test_tables_of_physics_are_made_from_the_results(mark):
    results = json.loads((physics_report.FOLDER / "physics.json").read_text())
    page = (ROOT / physics_report.PAGE).read_text(encoding="utf-8")
    assert between(mark, page) == physics_report.MARKS[mark](results)


def test_a_report_of_physics_fills_the_marks_and_draws(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / physics_report.PAGE
    page.write_text(
        "\n".join(f"<!-- {mark} -->\nold\n<!-- end -->" for mark in physics_report.MARKS)
    )
    physics_report.write(tmp_path)
    assert "old" not in page.read_text()
    assert (tmp_path / physics_report.PLOT).stat().st_size > 10_000
