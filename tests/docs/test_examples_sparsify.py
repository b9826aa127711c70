"""The script sparsify_and_finetune.py, run as a user runs it."""

import re

import mlx.core as mx
import pytest
from scripts import run_alone, run_here

SCRIPT = "sparsify_and_finetune.py"
METHODS = ["fine-tuned", "pruned", "sparse", "regrown"]
# A run of a second or two.
SMALL = ["--steps", "20", "--finetune", "20", "--batch", "16", "--width", "32", "--device", "cpu"]


def table(output):
    """Return the dense loss, and the losses of each row of the table by density."""
    heading = next(line for line in output.splitlines() if line.startswith("density"))
    assert heading.split() == ["density", *METHODS]
    rows = re.findall(r"^([\d.]+)((?: +\d\.\d{3}){4})$", output, flags=re.MULTILINE)
    dense = float(re.findall(r"dense (\d\.\d{3})$", output, flags=re.MULTILINE)[0])
    losses = {float(density): [float(loss) for loss in row.split()] for density, row in rows}
    return dense, losses


def test_it_compares_the_methods_and_draws_them(tmp_path):
    picture = tmp_path / "sparsify.png"
    result = run_alone(SCRIPT, *SMALL, "--densities", "1", "0.5", "--plot", str(picture))
    assert result.returncode == 0, result.stderr
    assert "280/280" in result.stderr  # the progress bar
    dense, losses = table(result.stdout)
    assert list(losses) == [0.5, 1]
    assert all(2 < loss < 4.5 for loss in losses[0.5])  # 103 characters by chance: 4.63
    # With all blocks kept, nothing is cut: these two are the dense network again.
    assert losses[1][:2] == pytest.approx([dense, dense], abs=2e-3)
    # With no block to grow, nothing moves.
    assert losses[1][2] == pytest.approx(losses[1][3], abs=2e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_one_table():
    arguments = [*SMALL, "--densities", "0.5", "--steps", "5", "--finetune", "5"]
    first = table(run_alone(SCRIPT, *arguments, "--seed", 1).stdout)
    again, other = (table(run_here(SCRIPT, *arguments, "--seed", s).stdout) for s in (1, 2))
    assert first == again != other


def test_help():
    result = run_alone(SCRIPT, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--densities", "--steps", "--finetune", "--block-size", "--plot", "--seed"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--finetune", "-1"], "--finetune must be at least 1, got -1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--block-size", "0"], "--block-size must be at least 1, got 0"),
        (["--block-size", "100", "--densities", "0.3"], "--densities must be in [0.333333, 1]"),
        (["--densities", "0.01"], "--densities must be in [0.0625, 1], got 0.01"),
        (["--densities", "0.5", "2"], "--densities must be in [0.0625, 1], got 2.0"),
        (["--densities", "nan"], "--densities must be in [0.0625, 1], got nan"),
        (["--densities"], "argument --densities: expected at least one argument"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0, got nan"),
        (["--plot", "no/such/a.png"], "--plot: there is no folder no/such"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--seed", "-1"], "argument --seed: must be an integer in [0, 2**32 - 1], got '-1'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, message):
    result = run_here(SCRIPT, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{SCRIPT}: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.not_emulated("runs another process")
def test_a_gpu_is_used_or_its_absence_is_one_line_and_status_2():
    result = run_alone(SCRIPT, *SMALL, "--densities", "0.5", "--device", "gpu")
    if mx.metal.is_available() or mx.cuda.is_available():
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 2
        assert "--device gpu: [use_device] no GPU is available" in result.stderr


def test_a_loss_that_is_not_finite_ends_the_run():
    result = run_here(SCRIPT, *SMALL, "--densities", "0.5", "--learning-rate", "1e30")
    assert result.returncode == 1
    assert "try a lower --learning-rate" in result.stderr.splitlines()[-1]
