"""The script sparsify_pretrained.py on models of a second, run, stopped and resumed."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scripts import EXAMPLES, command, run_alone, run_here
from support import ROOT

SCRIPT = "sparsify_pretrained.py"
METHODS = ["magnitude", "calibrated", "distilled"]
SMALL = ["--random", "--densities", "0.5", "--texts", "16", "--batch", "8", "--device", "cpu"]


@pytest.fixture
def distil(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("_distil")


def results(folder: Path, name: str = "runs/pretrained") -> dict[str, Any]:
    return json.loads((folder / name / "results.json").read_text())


def rows_of(found: dict[str, Any]) -> list[tuple[float, str]]:
    return [(row["density"], row["method"]) for row in found["rows"]]


def refused(arguments: list, message: str, folder: Path | None = None) -> None:
    result = run_here(SCRIPT, *arguments, folder=folder)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith(f"{SCRIPT}: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


def test_a_run_measures_and_draws_and_more_densities_can_follow(tmp_path: Path):
    arguments = [*SMALL, "--steps", 20, "--output", "out.json", "--plot", "a.png"]
    result = run_alone(SCRIPT, *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "20/20" in result.stderr  # the bar of distillation
    found = results(tmp_path)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert rows_of(found) == [(1.0, "dense"), *((0.5, method) for method in METHODS)]
    dense, magnitude, calibrated, distilled = found["rows"]
    assert dense["quality"]["spearman"] == pytest.approx(1)
    assert calibrated["linear_bytes"] < 0.6 * dense["linear_bytes"]
    # Even what has learned nothing computes something, and calibration keeps more of it.
    cosines = [row["quality"]["cosine"] for row in (magnitude, calibrated, distilled)]
    assert cosines[0] < cosines[1] < cosines[2]
    assert distilled["steps"] == 20
    picture = tmp_path / "a.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    again = run_here(SCRIPT, "--redraw", "out.json", "--plot", "b.png", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "b.png").read_bytes() == picture.read_bytes()

    arguments = [*SMALL, "--steps", 20, "--densities", 0.25, 0.5, "--resume"]
    more = run_here(SCRIPT, *arguments, folder=tmp_path)
    assert more.returncode == 0, more.stderr
    assert rows_of(results(tmp_path)) == [*rows_of(found), *((0.25, name) for name in METHODS)]
    assert results(tmp_path)["rows"][:4] == found["rows"]  # none was measured again


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path):
    arguments = [*SMALL, "--steps", 1000000]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may inherit SIG_IGN
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(SCRIPT, *arguments), cwd=tmp_path, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("0.5    calibrated"):
            assert process.poll() is None, process.stderr
        for _ in range(20):
            try:
                process.send_signal(signal.SIGINT)
                stderr = process.communicate(timeout=10)[1]
                break
            except subprocess.TimeoutExpired:
                continue
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.endswith("stopped; --resume goes on from there\n")
    before = results(tmp_path)
    assert rows_of(before)[-1] == (0.5, "calibrated")


def test_a_training_in_parts_ends_as_one_at_a_stretch(tmp_path: Path, distil, monkeypatch):
    arguments = [*SMALL, "--steps", 12]
    assert run_here(SCRIPT, *arguments, folder=tmp_path).returncode == 0

    rate, asked = distil.Distillation._rate, []

    def interrupting(self, part):
        asked.append(part)
        if len(asked) == 5:
            signal.raise_signal(signal.SIGINT)
        return rate(self, part)

    monkeypatch.setattr(distil.Distillation, "_rate", interrupting)
    parts = [*arguments, "--checkpoint", "parts"]
    assert run_here(SCRIPT, *parts, folder=tmp_path).returncode == 130
    path = tmp_path / "parts/distilled-0.5.safetensors"
    loaded: Any = mx.load(str(path), return_metadata=True)
    assert json.loads(loaded[1]["progress"])["step"] == 5  # the step in hand was not cut in two
    assert run_here(SCRIPT, *parts, "--resume", folder=tmp_path).returncode == 0
    assert len(asked) == 12
    whole, resumed = (
        mx.load(str(tmp_path / name / "distilled-0.5.safetensors"))
        for name in ("runs/pretrained", "parts")
    )
    assert isinstance(whole, dict)
    assert isinstance(resumed, dict)
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(np.array(whole[name]), np.array(resumed[name]), name)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, distil, monkeypatch
):
    loss, calls = distil.hidden_loss, []

    def breaking(states, targets, keep):
        calls.append(1)
        return loss(states, targets, keep) * (mx.inf if len(calls) > 1 else 1)

    # Uncompiled, the loss is called at each step; a checkpoint is written at each, too.
    monkeypatch.setattr(distil, "hidden_loss", breaking)
    monkeypatch.setattr(distil, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    result = run_here(SCRIPT, *SMALL, "--steps", 5, folder=tmp_path)
    assert result.returncode == 1
    assert "the loss is not finite at step 2" in result.stderr
    assert "Traceback" not in result.stderr
    loaded: Any = mx.load(
        str(tmp_path / "runs/pretrained/distilled-0.5.safetensors"), return_metadata=True
    )
    arrays, metadata = loaded
    assert json.loads(metadata["progress"])["step"] == 1
    assert all(mx.isfinite(a).all() for a in arrays.values() if a.dtype == mx.float32)


def test_a_language_model_of_mlx_lm(tmp_path: Path, monkeypatch):
    pytest.importorskip("mlx_lm", reason="it wants Python 3.11")
    monkeypatch.syspath_prepend(str(ROOT / "tests/layers"))
    tiny_models = importlib.import_module("tiny_models")
    tiny_models.save_dense("llama", tmp_path / "model")
    generator = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in generator.integers(92, size=4000))
    (tmp_path / "text.txt").write_text(text)
    small = ["--densities", 0.5, "--texts", 8, "--batch", 2, "--length", 32, "--steps", 3]
    arguments = ["--model", "model", "--data", "text.txt", *small, "--device", "cpu"]
    result = run_here(SCRIPT, *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    found = results(tmp_path)
    assert found["measure"] == "nats per token"
    assert [row["method"] for row in found["rows"]] == ["dense", *METHODS]
    assert all(4 < row["quality"]["nats"] < 6 for row in found["rows"])  # log(96) = 4.56
    refused([*arguments[:3], "missing.txt", *small, "--checkpoint", "b"], "--data", tmp_path)
    refused([*arguments, "--length", 3000, "--checkpoint", "c"], "is too short for", tmp_path)
    refused([*arguments, "--docstrings", "--checkpoint", "d"], "--docstrings is for an", tmp_path)
    records = [*arguments, "--data", "text.jsonl", "--checkpoint", "e"]
    refused(records, "--data must be plain text, not records", tmp_path)

    # A run does not go on with another text or model under the same name.
    (tmp_path / "text.txt").write_text(f"w91 {text}")
    refused([*arguments, "--resume"], "had other texts", tmp_path)
    (tmp_path / "text.txt").write_text(text)
    tiny_models.save_model(tmp_path / "model", tiny_models.make_dense("llama", seed=1))
    refused([*arguments, "--resume"], "had other weights", tmp_path)


def test_no_text_of_training_is_measured_on(distil):
    subjects = importlib.import_module("_subjects")
    texts = importlib.import_module("_texts")
    manual, more = (set(subjects.training_texts(flag)) for flag in (False, True))
    assert len(manual) > 2000
    assert manual < more
    for head, body in texts.evaluation():
        assert head not in more
        assert body[:300] not in more


def test_a_model_that_holds_a_compiled_function_is_copied(distil):
    model = nn.TransformerEncoder(num_layers=1, dims=32, num_heads=1, activation=nn.relu)
    x = mx.random.normal((1, 4, 32))
    before = np.array(model(x, None))
    copy = importlib.import_module("sparsify_pretrained").copied(model)
    np.testing.assert_array_equal(np.array(copy(x, None)), before)
    copy.layers[0].linear1.weight = mx.zeros((128, 32))
    np.testing.assert_array_equal(np.array(model(x, None)), before)


def test_gelu_is_that_of_mlx_with_its_gradient(distil):
    gelu, x = importlib.import_module("_minilm").rational_gelu, mx.linspace(-12, 12, 4001)
    for ours, theirs in ((gelu, nn.gelu), (grad_of(gelu), grad_of(nn.gelu))):
        np.testing.assert_allclose(np.array(ours(x)), np.array(theirs(x)), rtol=0, atol=2e-6)


def grad_of(function):
    return mx.grad(lambda x: function(x).sum())


def test_a_tap_is_no_part_of_the_model(distil):
    _minilm = importlib.import_module("_minilm")
    model = _minilm.Encoder(32, dims=32, heads=1, hidden=32, n_layers=2, longest=8)
    blocks = list(model.layers)
    ids, keep = mx.zeros((2, 4), mx.int32), mx.ones((2, 4))
    states, output = distil.states_of(model, (ids, keep))
    for state, expected in zip(states, model.hidden_states(ids, keep)[1:], strict=True):
        np.testing.assert_array_equal(np.array(state), np.array(expected))
    np.testing.assert_array_equal(np.array(output), np.array(model(ids, keep)))
    assert all(a is b for a, b in zip(model.layers, blocks, strict=True))
    keep = mx.array([[1.0, 1, 0, 0]] * 2)
    wrong = [state + mx.array([0.0, 0, 9, 9])[:, None] for state in states]
    assert float(distil.hidden_loss(wrong, states, keep)) == 0  # padding does not count
    assert float(distil.hidden_loss(states, [2 * s for s in states], keep)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--densities", "0"], "--densities must be at least 0.125 and below 1, got 0.0"),
        (["--densities", "1"], "--densities must be at least 0.125 and below 1, got 1.0"),
        (["--random", "--block-size", "256"], "--block-size 256: no nn.Linear of a random encoder"),
        (["--densities", "nan"], "--densities must be at least 0.125 and below 1, got nan"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--minutes", "inf"], "--minutes must be above 0, got inf"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0, got -1.0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "1"], "--batch must be at least 2, got 1"),
        (["--texts", "0"], "--texts must be at least 1, got 0"),
        (["--block-size", "0"], "--block-size must be at least 1, got 0"),
        (["--model", "missing"], "--model: missing is no directory of a model"),
        (["--random", "--data", "a.txt"], "--data is for a language model: an encoder takes"),
        (["--random", "--model", "x"], "--random is a model: give it or --model, not both"),
        (["--plot", "no/such/a.png"], "--plot: there is no folder no/such"),
        (["--output", "no/such/a.json"], "--output: there is no folder no/such"),
        (["--redraw", "a.json"], "--redraw needs --plot FILE"),
        (["--redraw", "a.json", "--plot", "a.png"], "--redraw: there is no file: a.json"),
        (["--resume"], "there is no run to resume: runs/pretrained/results.json"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--seed", "-1"], "argument --seed: must be an integer in [0, 2**32 - 1], got '-1'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, message, tmp_path: Path):
    refused(arguments, message, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_another_run_is_refused(tmp_path: Path):
    folder = tmp_path / "runs/pretrained"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    refused(SMALL, "is not empty; --resume goes on with its run", tmp_path)
    refused([*SMALL, "--resume"], "holds no results of this script", tmp_path)
    (folder / "results.json").unlink()
    assert run_here(SCRIPT, *SMALL, "--steps", 1, folder=tmp_path).returncode == 0
    resumed = [*SMALL, "--steps", 1, "--resume"]
    refused([*resumed, "--seed", 1], "the run of runs/pretrained has --seed 0", tmp_path)
    refused([*resumed, "--steps", 2], "the run of runs/pretrained has --steps 1", tmp_path)


def test_the_table_of_the_page_is_made_from_its_file(distil):
    table = importlib.import_module("sparsify_pretrained").table
    made = table(json.loads((ROOT / "docs/pretrained.json").read_text()))
    assert f"<!-- pretrained -->\n{made}\n<!-- end -->" in (ROOT / "docs/pretrained.md").read_text()


def test_the_page_says_where_its_numbers_come_from():
    found = json.loads((ROOT / "docs/pretrained.json").read_text())
    page = " ".join((ROOT / "docs/pretrained.md").read_text().split())
    kind, cores, _ = found["machine"].split(", ", 2)
    assert f"on a CPU ({kind}, {cores})" in page
    assert f"--minutes {found['settings']['minutes']:g} --plot pretrained.png" in page


def test_help():
    result = run_here(SCRIPT, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--densities", "--minutes", "--checkpoint", "--resume", "--plot", "--model"):
        assert option in result.stdout
    assert not re.search("default: None", result.stdout)
