"""The workflows of GitHub: they run what a person would, may do little, and are pinned.

actionlint, which one of them runs first, knows their language.
"""

import re

import pytest
import yaml
from support import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
JOBS = {
    f"{path.stem}/{name}": job
    for path in WORKFLOWS
    for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
}


def commands(job):
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_may_only_read(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_jobs_end_and_use_actions_as_they_were_read(job):
    """A tag may be moved to other code; a commit may not."""
    assert job["timeout-minutes"] <= 90
    assert "permissions" not in job
    for step in job["steps"]:
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_targets_of_make_exist(job):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([\w-]+)", commands(job)):
        assert re.search(rf"^{target}:", text, re.M), target


def test_a_mac_runs_the_kernels_and_keeps_what_it_measured():
    job = JOBS["tests/macos"]
    assert job["runs-on"].startswith("macos-")
    for command in ("make test", "make test-device", "-m mlx_sparse_nn check --device gpu"):
        assert command in commands(job)
    (kept,) = [step["with"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert "benchmarks/results/device.json" in kept["path"].split()
