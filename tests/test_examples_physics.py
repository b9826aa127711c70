"""examples/quantum_hamiltonian.py, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "quantum_hamiltonian.py"


def run(*arguments):
    command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


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
    assert "2304 stored values, density 3.516%" in result.stdout
    uniform, random, exact = energies(result.stdout)
    assert uniform == (-5.6, -0.7)
    assert exact == ground
    assert random[0] > exact[0]


def test_defaults_are_eight_qubits_at_field_0_7():
    assert energies(run().stdout)[-1] == (-8.30561, -1.03820)


def test_one_seed_gives_one_random_state():
    first, second, other = (
        energies(run("--device", "cpu", "--seed", seed).stdout)[1] for seed in ("1", "1", "2")
    )
    assert first == second != other


def test_help():
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--qubits", "--field", "--periodic", "--device", "--seed"):
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
        (["--field", "1e39"], "energies of up to 1e+39 overflow"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--seed", "-1"], "argument --seed: must be an integer in [0, 2**32 - 1], got '-1'"),
        (["--seed", "one"], "argument --seed: must be an integer in [0, 2**32 - 1], got 'one'"),
        (["--bonds", "3"], "unrecognized arguments: --bonds 3"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, message):
    assert_one_line_error(run(*arguments), message)


@pytest.mark.skipif(
    mx.metal.is_available() or mx.cuda.is_available(), reason="this machine has a GPU"
)
def test_a_gpu_that_is_not_there_is_one_line_and_status_2():
    assert_one_line_error(run("--device", "gpu"), "--device gpu: [use_device] no GPU is available")


def assert_one_line_error(result, message):
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("quantum_hamiltonian.py: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
