"""The scripts quantum_hamiltonian.py and neural_quantum_state.py, run as a user runs them."""

import math
import re
from unittest import mock

import mlx.core as mx
import pytest
from scripts import EXAMPLES, run_alone, run_here

from mlx_sparse_nn import BlockSparseLinear
from mlx_sparse_nn.physics import exact_ground_energy

HAMILTONIAN, NEURAL = "quantum_hamiltonian.py", "neural_quantum_state.py"


def run(*arguments):
    return run_here(HAMILTONIAN, *arguments)


def energies(output):
    """Return the total energy and the energy per site of every line that has them."""
    pairs = re.findall(r"= (-?\d+\.\d+) \((-?\d+\.\d+) per site\)", output)
    return [(float(total), float(per_site)) for total, per_site in pairs]


@pytest.mark.parametrize(
    ("arguments", "ground"),
    [([], (-8.30561, -1.03820)), (["--periodic"], (-9.02373, -1.12797))],
)
def test_prints_the_size_and_the_energies(arguments, ground):
    result = run("--qubits", "8", "--field", "0.7", "--device", "cpu", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert "256 x 256" in result.stdout
    assert "2304 stored values, density 0.0352" in result.stdout
    uniform, random, exact = energies(result.stdout)
    assert uniform == (-5.6, -0.7)
    assert exact == ground
    assert random[0] > exact[0]


def test_defaults_are_eight_qubits_at_field_0_7():
    assert energies(run_alone(HAMILTONIAN).stdout)[-1] == (-8.30561, -1.03820)


def test_one_seed_gives_one_random_state():
    arguments = ("--device", "cpu", "--seed")
    first = energies(run_alone(HAMILTONIAN, *arguments, 1).stdout)[1]
    second, other = (energies(run(*arguments, seed).stdout)[1] for seed in (1, 2))
    assert first == second != other


def test_help():
    result = run_alone(HAMILTONIAN, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in (
        "--qubits",
        "--field",
        "--periodic",
        "--quench",
        "--times",
        "--device",
        "--seed",
    ):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--qubits", "-1"], "n_qubits must be in [1, 2**31 - 1], got -1"),
        (["--qubits", "0"], "n_qubits must be in [1, 2**31 - 1], got 0"),
        (["--qubits", "40"], "n_qubits 40 needs 2**40 * 41 stored values"),
        (["--qubits", "2", "--periodic"], "n_qubits must be at least 3 for a ring, got 2"),
        (["--qubits", "many"], "argument --qubits: invalid int value: 'many'"),
        (["--field", "nan"], "field must be finite, got nan"),
        (["--field", "1e39"], "energies of up to 8e+39 overflow"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--seed", "-1"], "argument --seed: must be an integer in [0, 2**32 - 1], got '-1'"),
        (["--seed", "one"], "argument --seed: must be an integer in [0, 2**32 - 1], got 'one'"),
        (["--bonds", "3"], "unrecognized arguments: --bonds 3"),
        (["--sweep", "1:2"], "argument --sweep: must be MIN:MAX:POINTS with 0 <= MIN < MAX"),
        (["--sweep", "2:1:5"], "2 to 10000 points, got '2:1:5'"),
        (["--sweep", "0:nan:5"], "got '0:nan:5'"),
        (["--sweep", "0:1:1"], "got '0:1:1'"),
        (["--sweep", "0:1:2", "--qubits", "1"], "--sweep needs at least 2 qubits, got 1"),
        (["--sweep", "0:1:2", "--plot", "no/such/a.png"], "--plot: there is no folder no/such"),
        (["--sweep", "0:1:2", "--plot", "a.xyz"], "--plot: a.xyz must end in one of ."),
        (["--quench", "1:2", "--plot", "a.txt"], "--plot: a.txt must end in one of ."),
        (["--quench", "1:2", "--plot", "."], "--plot: . is a folder"),
        (["--quench", "1"], "argument --quench: must be FROM:TO, two fields with FROM above 0"),
        (["--quench", "0:1"], "FROM above 0 and TO of at least 0, got '0:1'"),
        (["--quench", "1:nan"], "got '1:nan'"),
        (["--quench", "1:2:3"], "got '1:2:3'"),
        (["--quench", "1:2", "--times", "0:1"], "argument --times: must be MIN:MAX:POINTS"),
        (["--quench", "1:2", "--qubits", "1"], "--quench needs at least 2 qubits, got 1"),
        (["--quench", "1:2", "--qubits", "40"], "n_qubits 40 needs 2**40 amplitudes"),
        (["--quench", "1:2", "--field", "1"], "--quench says its fields: leave out --field"),
        (["--sweep", "1:2:3", "--field", "1"], "--sweep says its fields: leave out --field"),
        (["--quench", "1:2", "--sweep", "0:1:2"], "--sweep and --quench do not go together"),
        (["--quench", "1:2", "--ground-state"], "--quench and --ground-state do not go together"),
        (["--times", "0:1:2"], "--times needs --quench"),
        (["--plot", "phase.png"], "--plot needs --sweep or --quench"),
        (["--ground-state", "--qubits", "1"], "--ground-state needs at least 2 qubits"),
        (["--ground-state", "--field", "-1"], "--ground-state needs a field of at least 0"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, message):
    assert_one_line_error(run(*arguments), message)


@pytest.mark.not_emulated("runs another process")
def test_a_gpu_is_used_or_its_absence_is_one_line_and_status_2():
    result = run_alone(HAMILTONIAN, "--device", "gpu")
    if mx.metal.is_available() or mx.cuda.is_available():
        assert (result.returncode, result.stderr) == (0, "")
    else:
        assert_one_line_error(result, "--device gpu: [use_device] no GPU is available")


@pytest.mark.parametrize("arguments", [(), ("--periodic", "--field", "1.3"), ("--field", "0")])
def test_ground_state_agrees_with_the_exact_values(arguments):
    result = run("--device", "cpu", "--ground-state", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    *_, exact, found = energies(result.stdout)
    assert found == pytest.approx(exact, abs=2e-5)
    assert ", converged" in result.stdout
    pairs = re.findall(r"(-?\d\.\d{5})(?: per site)?, exact +(-?\d\.\d{5})", result.stdout)
    assert len(pairs) == 3
    for measured, expected in pairs:
        assert float(measured) == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("periodic", [False, True])
def test_sweep_agrees_with_the_exact_curve_and_draws_it(tmp_path, periodic):
    picture = tmp_path / "phase.png"
    chain = ["--periodic"] if periodic else []
    result = run("--sweep", "0:2:5", "--device", "cpu", "--plot", str(picture), *chain)
    assert result.returncode == 0, result.stderr
    assert "5/5" in result.stderr  # the progress bar
    errors = re.findall(r"largest error +(\w+) +(\S+)", result.stdout)
    assert [name for name, _ in errors] == ["energy", "gap", "x", "zz"]
    assert all(float(error) < 2e-5 for _, error in errors)
    rows = re.findall(r"^[\d.]+ +-\d.*\|.*$", result.stdout, flags=re.MULTILINE)
    assert len(rows) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_entropy_of_a_degenerate_level_is_said_to_be_of_one_vector():
    text = "nats across the middle, of one vector of several: the level is degenerate"
    assert text in run("--device", "cpu", "--ground-state", "--field", "0").stdout
    assert "of one vector" not in run("--device", "cpu", "--ground-state").stdout


@pytest.mark.parametrize(
    ("n", "periodic"), [(2, False), (5, False), (8, False), (3, True), (5, True), (8, True)]
)
@pytest.mark.parametrize("fields", ["0.4:1.6", "1.5:0", "1:1"])
def test_quench_agrees_with_free_fermions(n, fields, periodic):
    chain = ["--periodic"] if periodic else []
    arguments = ["--qubits", n, "--quench", fields, "--times", "0:3:10", "--device", "cpu"]
    result = run(*map(str, arguments), *chain)
    assert result.returncode == 0, result.stderr
    assert "10/10" in result.stderr  # the progress bar
    errors = re.findall(r"largest error +(\w+) +(\S+)", result.stdout)
    assert [name for name, _ in errors] == ["x", "zz", "entropy", "back"]
    assert all(float(error) < 5e-5 for _, error in errors)
    assert len(re.findall(r"^[\d.]+ +-?\d.*\|.*$", result.stdout, flags=re.MULTILINE)) == 10


def test_quench_of_independent_spins_in_closed_form():
    """Two sites, from field 2 to 0: <X> of each is that of the start times cos 2t."""
    table = run("--qubits", "2", "--quench", "2:0", "--times", "0:1:2", "--device", "cpu").stdout
    start, later = (
        [float(cell) for cell in re.findall(r"-?\d+\.\d{5}", line)]
        for line in table.splitlines()
        if re.match(r"[01] ", line)
    )
    assert later[0] == pytest.approx(start[0] * math.cos(2), abs=2e-5)
    assert later[2] == pytest.approx(start[2], abs=2e-5)  # Z_0 Z_1 is H, which is conserved


def test_quench_draws_a_picture(tmp_path):
    picture = tmp_path / "quench.svg"
    result = run("--qubits", "4", "--quench", "0.5:2", "--times", "0:1:3", "--plot", str(picture))
    assert result.returncode == 0, result.stderr
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_sweep_gap_against_the_known_spectrum():
    """At the critical field the open chain has the gap 4 sin(pi / (2 (2 n + 1)))."""
    table = run("--sweep", "0.5:1:2", "--qubits", "6", "--device", "cpu").stdout
    row = next(line for line in table.splitlines() if line.startswith("1 "))
    gap = float(row.split("|")[1].split()[1])
    assert gap == pytest.approx(4 * math.sin(math.pi / 26), abs=1e-5)


def neural_error(*arguments):
    """Return the relative error that the neural state's script prints."""
    result = run_here(NEURAL, "--device", "cpu", *arguments)
    assert result.returncode == 0, result.stderr
    return float(re.findall(r"error +(\S+) relative", result.stdout)[0])


def test_neural_quantum_state_reaches_the_ground_energy(tmp_path):
    picture = tmp_path / "error.png"
    arguments = ["--qubits", "8", "--steps", "20", "--device", "cpu", "--plot", str(picture)]
    result = run_alone(NEURAL, *arguments)
    assert result.returncode == 0, result.stderr
    assert re.search(r"20/20 .*error \d\.\de-0\d", result.stderr)  # the progress bar
    energy, exact = (
        float(re.findall(rf"{name} +(-\d+\.\d+)", result.stdout)[0]) for name in ("energy", "exact")
    )
    assert abs(exact + 9.837951) < 1e-6
    assert abs(energy / exact - 1) < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("chain", [[], ["--periodic"]])
@pytest.mark.parametrize("field", [0.2, 0.5, 2.5])
def test_a_neural_state_has_no_domain_wall(field, chain):
    """In the ordered phase the nearest state with a domain wall lies 2 J above: 0.3 of E."""
    assert neural_error("--qubits", 6, "--steps", 30, "--field", field, *chain) < 1e-5


def test_seeds_of_a_neural_state_agree_on_the_energy():
    """A start that matters would show here; one seed gives one state."""
    errors = [
        neural_error("--qubits", 6, "--steps", 20, "--seed", seed) for seed in (0, 1, 2, 3, 3)
    ]
    assert max(errors) < 1e-5
    assert errors[3] == errors[4]


def test_a_neural_state_that_is_not_finite_ends_the_script():
    def diverged(layer, x):
        return mx.full((*x.shape[:-1], layer.pattern.shape[0]), math.nan)

    with mock.patch.object(BlockSparseLinear, "__call__", diverged):
        result = run_here(NEURAL, "--qubits", 4, "--device", "cpu")
    assert (result.returncode, result.stdout) == (1, "")
    message = "psi is not finite; try a shorter --tau"
    assert result.stderr.splitlines()[-1] == f"{NEURAL}: error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--qubits", "2"], "--qubits must be in [3, 16], got 2"),
        (["--qubits", "17"], "--qubits must be in [3, 16], got 17"),
        (["--field", "0"], "--field must be above 0, so that psi > 0, got 0.0"),
        (["--field", "nan"], "--field must be above 0, so that psi > 0, got nan"),
        (["--field", "1e38"], "overflow"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--products", "0"], "--products must be at least 1, got 0"),
        (["--tau", "-1"], "--tau must be above 0, got -1.0"),
        (["--width", "40"], "--width must be a multiple of 16, got 40"),
        (["--density", "2"], "density must be in (0, 1], got 2"),
        (["--plot", "no/such/a.png"], "--plot: there is no folder no/such"),
        (["--plot", "a.xyz"], "--plot: a.xyz must end in one of ."),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_a_bad_argument_of_the_neural_state(arguments, message):
    assert_one_line_error(run_here(NEURAL, *arguments), message, NEURAL)


def test_the_page_on_physics(capsys):
    """Its code runs and prints what it says; its reference values are the exact ones."""
    page = (EXAMPLES.parent / "docs" / "physics.md").read_text(encoding="utf-8")
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], {})
    lanczos_energy, exact, *_ = capsys.readouterr().out.splitlines()
    assert lanczos_energy.startswith("-12.79261")
    assert float(exact) == pytest.approx(-12.7926160298358, rel=1e-13)
    rows = re.findall(r"^\| (\d+) \| (\d\.\d) \| (-[\d.]+) \| (-[\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for n, h, *values in rows:
        for value, periodic in zip(values, (False, True), strict=True):
            energy = exact_ground_energy(int(n), float(h), periodic=periodic)
            assert float(value) == pytest.approx(energy, rel=1e-13)
    for picture in re.findall(r"\]\((\w+\.png)\)", page):
        assert (EXAMPLES.parent / "docs" / picture).is_file()


def test_the_orders_on_the_page(capsys):
    page = (EXAMPLES.parent / "docs" / "physics.md").read_text(encoding="utf-8")
    code = (
        page.partition("## The order of QuTiP")[2].partition("```python\n")[2].partition("```")[0]
    )
    exec(code, {})
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
    assert len(said) == 2


def assert_one_line_error(result, message, script=HAMILTONIAN):
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{script}: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
