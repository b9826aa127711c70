"""The benchmarks: workloads know their right results, and tables are made from the record."""

import ctypes
import ctypes.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    __main__,
    environments,
    measure,
    models,
    openblas,
    report,
    roofline,
    sparse_products,
    sweep,
    sweep_report,
    sweep_server,
    workloads,
)
from benchmarks.sweep import Cell  # noqa: E402
from benchmarks.workloads import Array, Build, Call, Ising, Layer  # noqa: E402

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
    Layer(64, 16, 0.25, 3, "float64"),
    Call("layer", 1),
    Call("array", 4),
]


@pytest.fixture(scope="module")
def processes():
    """Peers that need no environment of their own."""
    names = ("ours", "plain", "linear", "block_masked_mm")
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
    assert set(layer) == {"ours", "plain", "linear", "block_masked_mm"}
    assert set(results[3]["peers"]) == {"ours", "plain"}
    assert set(results[-2]["peers"]) == {"ours", "plain", "linear"}
    # Inputs, results and gradients: nothing can take less.
    for result in results:
        if result["held"]:
            memory = report.memory(result)
            assert memory is not None
            assert memory >= 1


def test_each_peer_says_who_computes(processes):
    says = {process.name: process.ask("versions") for process in processes}
    assert says["plain"]["backends"] == "plain"
    assert says["ours"]["backends"].endswith("plain")
    if sys.platform == "linux":
        assert says["linear"]["blas"] == "netlib"


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
        ("layers --full", 2 * 6 * 5 * 4 * 4 * 2),
        ("layers --features 1024 --rows 256", 6 * 5 * 4 * 2),
        ("layers --features 1152 --block-size 12 --dtype float32 --step forward", 5 * 4),
        ("ising --qubits 3 4", 2),
        ("arrays --columns 5", 8),
        ("build", 5),
        ("calls", 4),
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


def test_features_are_a_multiple_of_the_block_size():
    args = __main__.parser().parse_args(["layers", "--features", "1024", "--block-size", "12"])
    with pytest.raises(SystemExit, match="--features 1024 has no blocks of 12"):
        __main__.chosen(args)


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
    with pytest.raises(SystemExit, match="--peers to leave none out"):
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
    assert report.memory(result, "linear") is None


def test_aims_without_counts_of_memory():
    build = {"kind": "build", "what": "transpose", "size": 8, "per_row": 2}
    result = {"workload": build, "held": None, "made": None, "peers": {"ours": {"turns": [1.0]}}}
    text = report.aims({"machine": {}, "results": [result]})
    lines = [line for line in text.splitlines() if "memory" in line]
    assert lines
    assert all(line.endswith("| not measured |") for line in lines)


def layer_result(seconds, dtype="float32", step="training", **peers):
    """Return the result of a layer of 1024 features, and of peers that take so many seconds."""
    workload = workloads.to_json(Layer(1024, 32, 0.5, 256, dtype, step))
    turns = {name: {"turns": [s], "kept": 1, "peak": 1 + 3 * 2**20} for name, s in peers.items()}
    ours = {"turns": [seconds], "kept": 1, "peak": 1 + 2 * 2**20}
    return {"workload": workload, "held": 1, "made": 2**20, "peers": {"ours": ours, **turns}}


def test_rates_and_ratios_of_layers():
    result = layer_result(0.1, torch=0.3, mlx_sparse=0.2, plain=0.8)
    assert report.stored_values(result["workload"]) == 512 * 1024
    assert report.gflops(result) == pytest.approx(2 * 3 * 512 * 1024 * 256 / 0.1 / 1e9)
    assert report.fastest_peer(result) == 2.0
    assert report.less_memory(result) == 2.0
    assert report.fastest_peer(layer_result(0.1, linear=0.3)) is None
    both = {"results": [result, layer_result(0.15, "bfloat16"), layer_result(0.1, "float16")]}
    assert report.slower_than_float32(both, "bfloat16") == [pytest.approx(1.5)]


def test_aims_are_reached_by_the_slowest_and_the_mean():
    def reached(seconds):
        results = [layer_result(s, torch=1.0) for s in seconds]
        text = report.aims({"machine": {"roofline": None}, "results": results})
        (line,) = [
            line for line in text.splitlines() if "training, 16 rows" in line and "Py" in line
        ]
        return line.split(" | ")[1]

    assert reached([0.1, 0.9]) == "yes"
    assert reached([0.1, 1.1]) == "no"  # one is slower
    assert reached([0.9, 0.9]) == "no"  # 1.1 times in the mean


def test_reading_lies_between_the_rates_measured():
    first = {"gflops": 5.0, "read": [[100, 10.0], [10_000, 1.0]]}
    second = {"gflops": 6.0, "read": [[100, 9.0], [10_000, 2.0]]}
    measured = roofline.better(first, second)
    assert measured == {"gflops": 6.0, "read": [[100, 10.0], [10_000, 2.0]]}
    assert roofline.reading(measured, 50) == 10e9
    assert roofline.reading(measured, 1000) == pytest.approx(6e9)
    one_row = {
        "workload": workloads.to_json(Layer(1024, 32, 0.5, 1)),
        "peers": {"ours": {"turns": [1e-3]}},
    }
    assert report.reads(one_row, measured) == pytest.approx(1e-3 / (2 * 2**20 / 2e9))


@pytest.mark.skipif(sys.platform != "linux", reason="it is compiled on Linux")
def test_what_measures_the_cores_does_what_is_counted(tmp_path):
    library = roofline.build(tmp_path)
    assert library.multiply_adds_a_round() % 12 == 0
    ones = np.ones(1024, np.float32)
    library.read_floats.restype = library.multiply_adds.restype = ctypes.c_float
    assert library.read_floats(ones.ctypes.data, 1024) == 1024
    assert library.multiply_adds(50, 0.5, 1.0) == pytest.approx(2 * library.multiply_adds_a_round())
    assert 0 < roofline.fastest(lambda core: math.sqrt(core), runs=3) < 1


def test_processes_that_are_measured_have_the_same_threads(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "what a user has")
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    pinned = environments.variables()
    assert "LD_PRELOAD" not in pinned
    assert {pinned[name] for name in environments.THREADS} == {str(environments.cores())}


def test_an_openblas_that_is_installed_is_found(monkeypatch):
    monkeypatch.setattr(openblas.sys, "platform", "linux")
    monkeypatch.setattr(openblas.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.0")
    assert openblas.installed() == "libopenblas.so.0"
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert openblas.installed() == ""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs cc, on Linux")
def test_openblas_gets_the_names_that_mlx_calls(tmp_path):
    source = tmp_path / "stub.c"
    arguments = (
        "int o, int p, int q, int m, int n, int k, {0}, const void* a, int lda, const void* b"
    )
    rest = "int ldb, {0}, {1}* c, int ldc"
    lines = ["int called;"]
    for name, scalar, value in (
        ("cblas_sgemm", "float", "float"),
        ("cblas_dgemm", "double", "double"),
        ("cblas_cgemm", "const void*", "void"),
    ):
        parameters = f"{arguments.format(scalar + ' s')}, {rest.format(scalar + ' t', value)}"
        lines.append(f"void scipy_{name}({parameters}) {{ called += m * ldc; }}")
    source.write_text("\n".join(lines))
    stub = tmp_path / "libscipy_openblas.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", str(source), "-o", str(stub)], check=True)
    target = openblas.renamed(tmp_path, tmp_path / "made/libopenblas.so")
    assert target is not None
    library = ctypes.CDLL(str(target))
    number = ctypes.c_float(1.0), ctypes.c_double(1.0), None
    names = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
    for name, one in zip(names, number, strict=True):
        getattr(library, name)(101, 111, 111, 3, 2, 2, one, None, 2, None, 2, one, None, 7)
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(stub)), "called").value == 3 * 21
    assert [path.name for path in target.parent.iterdir()] == ["libopenblas.so"]


CELLS = [
    Cell(24, 48, block_size, density, dtype, step, rows)
    for block_size, density in ((1, 0.5), (12, 0.25))
    for dtype in ("float32", "bfloat16")
    for step in ("forward", "training")
    for rows in (1, 5)
]


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "sweep.json"
    first = sweep.run(CELLS[:5], "cpu", path, quick=True, openblas=False)
    assert json.loads(path.read_text()) == first
    results = sweep.run(CELLS, "cpu", path, quick=True, openblas=False)
    assert results["results"][:5] == first["results"]
    assert [Cell(**r["cell"]) for r in results["results"]] == CELLS
    for r in results["results"]:
        assert sweep_report.wrong(r) is None
        assert set(r["sparse"]["backends"]) == {*sweep_server.PRODUCTS[r["cell"]["step"]]}
    worst = max(value or 0 for value, _ in sweep_report.ratios(results))
    lines = sweep_report.text(results).splitlines()
    at = lines.index("### The worst cells")
    assert lines[at + 4].endswith(f"| {report.number(worst)} |")
    sweep_report.draw(results, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

    other = {**results, "machine": {**results["machine"], "sources": "others"}}
    sweep.save(other, path)
    with pytest.raises(SystemExit, match="has sources others"):
        sweep.run(CELLS, "cpu", path, quick=True, openblas=False)


def test_a_sweep_outlives_the_process_it_measures(tmp_path):
    no_such_dtype = Cell(24, 48, 12, 0.25, "float99", "forward", 1)
    results = sweep.run([no_such_dtype, CELLS[0]], "cpu", tmp_path / "sweep.json", True, False)
    assert list(map(sweep_report.wrong, results["results"])) == ["the process ended", None]
    assert "the process ended" in sweep_report.text(results)


def test_a_sweep_says_what_is_wrong():
    import mlx.core as mx

    expected = [np.zeros((2, 2)), np.ones(3)]
    checked = lambda *arrays: sweep_server._checked(lambda: [*map(mx.array, arrays)], expected)[1]
    assert checked(expected[0], expected[1]) is None
    assert checked(expected[0], [1.0, 2.0, 1.0]) == "the weight's gradient is 2 at [1], expected 1"
    assert checked([[0.0]]) == "y is of shape (1, 1), expected (2, 2)"

    def fails():
        raise TypeError("no such product")

    assert sweep_server._checked(fails, expected) == (math.inf, "TypeError: no such product")


def test_a_dense_layer_has_the_least_of_its_times():
    def result(block_size, sparse, dense):
        cell = Cell(24, 24, block_size, 0.5, "float32", "forward", 1)
        times = {"sparse": {"seconds": sparse}, "dense": {"seconds": dense}}
        return {"cell": vars(cell), **times}

    results = {"results": [result(1, 4.0, 2.0), result(2, 3.0, 1.0), result(4, None, None)]}
    assert [value for value, _ in sweep_report.ratios(results)] == [4.0, 3.0, None]


def test_a_dense_call_that_takes_too_long_is_not_made():
    server = sweep_server.SweepServer("cpu")
    server._rates["float32"] = 10.0
    cell = {**vars(CELLS[0]), "rows": 4}
    answer = server.dense(cell, 4, 0.001, limit=45.0)
    assert answer == {"seconds": None, "why": f"a call would take {24 * 48 * 4 / 10:.0f} s"}


def test_the_grid_of_a_sweep():
    cells = sweep.grid("cpu")
    assert len(set(cells)) == len(cells) == 3 * 12 * 2 * 4 * 2 * 11
    assert not any(n % c.block_size for c in cells for n in (c.outputs, c.inputs))
    assert {c.dtype for c in sweep.grid("gpu")} == {"float32", "bfloat16", "float16"}
    quick = sweep.grid("cpu", quick=True)
    assert {c.block_size for c in quick} == {*sweep.AXES["block_size"]}
    assert len(sweep.grid("cpu", rows=[1], dtype=["float16"])) == 3 * 12 * 2 * 2


def test_sums_of_a_sweep_are_exact_in_bfloat16():
    wide = sweep_server.Weight(sweep_server.Operands(64, 4608, 128), 1, 0.5)
    tall = sweep_server.Operands(64, 64, 4096)
    assert np.abs(wide.expected("forward", 128, of_dense=True)[0]).max() <= 256
    assert np.abs(tall.gradient(4096)).max() <= 256


@pytest.mark.parametrize(("page", "mark"), models.MARKS)
def test_tables_of_models_are_made_from_their_results(page, mark):
    results = json.loads(models.RESULTS.read_text())
    text = (ROOT / page).read_text(encoding="utf-8")
    assert report.between(mark, text) == models.MARKS[page, mark](results)


@pytest.mark.parametrize("what", models.SMALL)
def test_small_models_are_timed(what):
    command = "import sys; from benchmarks import models; models.SECONDS = 0.0; "
    command += "print(models.child(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-c", command, what], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert float(ran.stdout) > 0


@pytest.mark.parametrize(("page", "mark"), [m for m in report.MARKS if m[0] == report.PAGE])
def test_tables_are_made_from_the_results(page, mark):
    results = json.loads(report.RESULTS.read_text())
    expected = report.MARKS[page, mark](results)
    assert report.between(mark, (ROOT / page).read_text(encoding="utf-8")) == expected


def test_the_page_has_the_table_of_the_results():
    text = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    results = json.loads(report.RESULTS.read_text())
    assert report.between("cpu", text) == report.summary(results)


def test_a_report_fills_the_marks_and_draws(tmp_path):
    results = json.loads(report.RESULTS.read_text())
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).mkdir()
    for page in ("docs/backends.md", report.PAGE):
        marks = [mark for of_page, mark in report.MARKS if of_page == page]
        text = "\n".join(f"<!-- {mark} -->\nold\n<!-- end -->" for mark in marks)
        (tmp_path / page).write_text(text)
    report.write(results, tmp_path)
    for page, mark in report.MARKS:
        text = (tmp_path / page).read_text()
        assert report.between(mark, text) == report.MARKS[page, mark](results)
    for name in ("cpu", "scaling"):
        assert (tmp_path / f"docs/{name}.png").stat().st_size > 10_000


def test_products_of_two_sparse_matrices_are_right_and_timed():
    found = sparse_products.products(0.002)
    assert len(found) == 7
    for name, factors in found.items():
        times = sparse_products.measure(name, factors, 1)
        assert min(times["scipy"], times["first"], times["later"]) >= 0
        assert times["stored"] > 100
    page = (ROOT / "docs/arrays.md").read_text(encoding="utf-8")
    results = json.loads(sparse_products.RESULTS.read_text(encoding="utf-8"))
    table = f"<!-- products -->\n{sparse_products.table(results)}\n<!-- end -->"
    assert table in page
