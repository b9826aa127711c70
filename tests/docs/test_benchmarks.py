"""The benchmarks: workloads know their right results, and tables are made from the record."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__, environments, measure, report, workloads  # noqa: E402
from benchmarks.workloads import Array, Build, Ising, Layer  # noqa: E402

SMALL = [
    Layer(64, 8, 0.25, 3),
    Layer(64, 1, 0.1, 1, "bfloat16", "training"),
    Layer(64, 32, 0.5, 5, "float32", "training"),
    Array(50, 4, "skewed", 3, "training"),
    Array(50, 4, "equal", 1),
    Ising(5),
    Build("from coordinates", 40, 3),
    Build("from CSR, one product", 40, 3),
    Build("transpose", 40, 3),
    Build("from dense", 64, 8),
    Build("from dense", 64, 16, block_size=8),
]


@pytest.fixture(scope="module")
def processes():
    """Peers that need no environment of their own."""
    names = ("ours", "linear", "block_masked_mm")
    running = [measure.Process(name, name) for name in names]
    yield running
    for process in running:
        process.__exit__()


def test_every_workload_is_right_at_peers_that_take_turns(processes):
    results = list(measure.measure(SMALL, processes, turns=3, seconds=0.001))
    assert [workloads.from_json(r["workload"]) for r in results] == SMALL
    for result in results:
        for peer in result["peers"].values():
            assert len(peer["turns"]) == 3
            assert peer["calls"] >= 3
            assert min(peer["turns"]) > 0
    layer = results[2]["peers"]
    assert set(layer) == {"ours", "linear", "block_masked_mm"}
    assert set(results[3]["peers"]) == {"ours"}
    # Inputs, results and gradients: nothing can take less. The layout is more than CSR.
    for result in results:
        if result["held"]:
            memory = report.memory(result)
            assert memory is not None
            assert 1 <= memory < report.memory_of_csr(result)


def test_one_dense_layer_stands_for_all_patterns(processes):
    group = [Layer(64, b, d, 3) for b in (8, 16) for d in (0.1, 0.5)]
    results = list(measure.measure(group, processes, turns=3, seconds=0.001))
    assert len({id(r["peers"]["linear"]) for r in results}) == 1
    assert len({id(r["peers"]["ours"]) for r in results}) == 4


def test_peers_take_turns():
    order = []

    class Entry:
        def __init__(self, name):
            self.name, self.spent = name, 0.0

        def turn(self, seconds):
            order.append(self.name)
            self.spent += 10.0 if self.name == "slow" else 0.0

    measure._take_turns([Entry("a"), Entry("slow"), Entry("b")], 5, 0.1, 1.0)  # pyright: ignore
    assert order[:9] == ["a", "slow", "b", "slow", "b", "a", "b", "a", "slow"]
    assert order[9:] == ["a", "b", "b", "a"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([], "gives 0 results"),
        ([np.zeros((1, 64))], r"result 0 of peer is of shape \(1, 64\), expected \(3, 64\)"),
        ([np.full((3, 64), 100.0)], r"result 0 of peer is 100.0 at \[0, 0\], expected"),
    ],
)
def test_a_wrong_result_ends_the_run(out, message):
    w = SMALL[0]
    with pytest.raises(SystemExit, match=message):
        measure.check(w, "peer", out, w.expected(w.arrays()))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ising_arrays_are_the_hamiltonian(n):
    from mlx_sparse_nn import physics

    arrays = Ising(n).arrays()
    H = physics.transverse_field_ising(n, 1.0, coupling=2.0)
    np.testing.assert_array_equal(arrays["indptr"], H.pattern.indptr)
    np.testing.assert_array_equal(arrays["indices"], H.pattern.indices)
    np.testing.assert_array_equal(arrays["data"], np.array(H.data))


@pytest.mark.parametrize("lengths", ["equal", "skewed"])
def test_expected_results_of_arrays_are_scipys(lengths):
    w = Array(60, 5, lengths, 4, "training")
    a = w.arrays()
    A = scipy.sparse.csr_array((a["data"], a["indices"], a["indptr"]), shape=(60, 60))
    y, of_data, of_x = w.expected(a)
    np.testing.assert_array_equal(y, A @ a["x"])
    np.testing.assert_array_equal(of_x, A.T @ a["target"])
    row, col = A.tocoo().coords
    np.testing.assert_array_equal(of_data, (a["target"] @ a["x"].T)[row, col])


@pytest.mark.parametrize("density", workloads.AXES["density"])
@pytest.mark.parametrize("block_size", workloads.AXES["block_size"])
def test_layers_have_the_density_they_are_named_after(block_size, density):
    arrays = Layer(1024, block_size, density, 1).arrays()
    assert abs(arrays["mask"].mean() - density) <= 0.5 / arrays["mask"].size
    per_row = arrays["mask"].sum(axis=1)
    assert per_row.max() - per_row.min() <= 1


def test_sums_are_exact_in_bfloat16():
    w = Layer(1024, 8, 0.5, 256, "bfloat16", "training")
    assert all(np.abs(a).max() <= 256 for a in w.expected(w.arrays()))


@pytest.mark.parametrize(
    ("argv", "count"),
    [
        ("layers --full", 2 * 6 * 5 * 4 * 2 * 2),
        ("layers --features 1024 --rows 256", 6 * 5 * 2 * 2),
        ("layers --block-size 12 --dtype float32 --step forward --density 0.1", 2 * 4),
        ("ising --qubits 3 4", 2),
        ("arrays --columns 5", 8),
        ("build", 5),
    ],
)
def test_the_command_line_chooses_workloads(argv, count):
    args = __main__.parser().parse_args(argv.split())
    assert len(set(__main__.chosen(args))) == count


def test_the_default_set_covers_the_axes():
    args = __main__.parser().parse_args([])
    layers = [w for w in __main__.chosen(args) if isinstance(w, Layer)]
    for axis, values in workloads.AXES.items():
        assert set(values) <= {getattr(w, axis) for w in layers}


def test_a_peer_of_another_device_is_refused():
    with pytest.raises(SystemExit, match="scipy does not run on gpu"):
        __main__.main(["ising", "--device", "gpu", "--peers", "ours", "scipy"])


def test_a_peer_that_stops_is_named(monkeypatch):
    monkeypatch.setitem(environments.PEERS, "nobody", environments.Peer("Nobody"))
    process = measure.Process("nobody", "nobody")
    with process, pytest.raises(SystemExit, match="nobody stopped at versions"):
        process.ask("versions")


def test_a_peer_that_cannot_be_installed_is_an_error(monkeypatch, tmp_path):
    peer = environments.Peer("None", ("no-such-package-at-all @ file:///nowhere",))
    monkeypatch.setattr(environments, "PEERS", {"none": peer})
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="--peers to leave it out"):
        environments.python_of("none")
    assert not (tmp_path / "none/installed.txt").exists()


def test_ratios_are_taken_turn_by_turn():
    result = {
        "held": 5,
        "made": 2,
        "peers": {
            "ours": {"turns": [1.0, 2.0, 4.0], "kept": 8, "peak": 30},
            "linear": {"turns": [3.0, 4.0]},
        },
    }
    assert report.ratios(result, "linear") == [3.0, 2.0]
    assert report.ratio(result, "linear") == 2.5
    assert report.cell(result, "scipy") == "-"
    assert report.memory(result) == 3
    assert report.memory_of_csr(result) == 6
    assert report.memory(result, "linear") is None


def test_aims_without_counts_of_memory():
    build = {"kind": "build", "what": "transpose", "size": 8, "per_row": 2}
    result = {"workload": build, "held": None, "made": None, "peers": {"ours": {"turns": [1.0]}}}
    assert "memory" not in report.aims({"results": [result]})


@pytest.mark.parametrize(("page", "mark"), [m for m in report.MARKS if m[0] == report.PAGE])
def test_tables_are_made_from_the_results(page, mark):
    results = json.loads(report.RESULTS.read_text())
    expected = report.MARKS[page, mark](results)
    assert report.between(mark, (ROOT / page).read_text(encoding="utf-8")) == expected


def test_the_readme_has_the_table_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads(report.RESULTS.read_text())
    assert report.between("cpu", text) == report.summary(results)


def test_a_report_fills_the_marks_and_draws(tmp_path):
    results = json.loads(report.RESULTS.read_text())
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).mkdir()
    for page in ("README.md", report.PAGE):
        marks = [mark for of_page, mark in report.MARKS if of_page == page]
        text = "\n".join(f"<!-- {mark} -->\nold\n<!-- end -->" for mark in marks)
        (tmp_path / page).write_text(text)
    report.write(results, tmp_path)
    for page, mark in report.MARKS:
        text = (tmp_path / page).read_text()
        assert report.between(mark, text) == report.MARKS[page, mark](results)
    for name in ("cpu", "scaling"):
        assert (tmp_path / f"docs/{name}.png").stat().st_size > 10_000
