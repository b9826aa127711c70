"""The workflows of GitHub: they run what a person would, may do little, and are pinned.

actionlint, which one of them runs first, knows their language.
"""

import re
import runpy
import sys

import pytest
import yaml
from support import ROOT

from mlx_sparse_nn import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

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
    # A release that has begun to upload goes on to its end.
    assert workflow["concurrency"]["cancel-in-progress"] is (path.stem != "release")
    assert "secrets." not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "job"), JOBS.items(), ids=JOBS)
def test_jobs_end_and_use_actions_as_they_were_read(name, job):
    """A tag may be moved to other code; a commit may not."""
    assert job["timeout-minutes"] <= 90
    # Who publishes proves to the index which workflow it is; there is no secret.
    allowed = {"id-token": "write"} if name == "release/publish" else None
    assert job.get("permissions") == allowed
    for step in job["steps"]:
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_targets_of_make_exist(job):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([\w-]+)", commands(job)):
        assert re.search(rf"^{target}:", text, re.M), target


def test_a_release_is_tried_before_it_is_published():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert workflow["jobs"]["publish"]["needs"] == ["build", "wheel"]
    assert workflow["jobs"]["publish"]["environment"] == "pypi"
    assert "make dist" in commands(JOBS["release/build"])
    systems = workflow["jobs"]["wheel"]["strategy"]["matrix"]["os"]
    assert {name.partition("-")[0] for name in systems} == {"ubuntu", "macos"}


URL, TAG = "https://github.com/someone/mlx_sparse_nn", f"v{__version__}"
add_addresses = runpy.run_path(str(ROOT / ".github/add_addresses.py"))["with_addresses"]


def test_a_release_says_where_it_comes_from():
    """What an index shows is all that a stranger has: pictures, links and commands work there."""
    build = commands(JOBS["release/build"])
    assert 0 < build.index(".github/add_addresses.py") < build.index("make dist")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    after = tomllib.loads(add_addresses(text, URL, TAG))
    urls = after["project"].pop("urls")
    assert urls["Homepage"] == URL
    assert all(address.startswith(URL) for address in urls.values())
    hook = after["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)", readme)
    for substitution in hook["substitutions"]:
        readme = re.sub(substitution["pattern"], substitution["replacement"], readme)
    expected = [
        link
        if "://" in link
        else f"{URL}/{'raw' if link.endswith('.png') else 'blob'}/{TAG}/{link}"
        for link in links
    ]
    assert re.findall(r"\]\(([^)]*)\)", readme) == expected
    installs = re.findall(r"^pip install (\S+)", readme, re.MULTILINE)
    assert installs == ["mlx-sparse-nn", '"mlx-sparse-nn[cpu]"', '"mlx-sparse-nn[cuda13]"']
    assert "no package index" not in readme
    hook["substitutions"] = hook["substitutions"][-2:]
    assert after == tomllib.loads(text)  # and nothing else is changed


@pytest.mark.parametrize(
    ("url", "tag"),
    [
        ("https:///", TAG),
        ("http://github.com/a/b", TAG),
        (URL + '"', TAG),
        (URL, "main"),
        (URL, ""),
    ],
)
def test_a_release_without_an_address_is_none(url, tag):
    with pytest.raises(ValueError, match=r"^(url|tag) must be "):
        add_addresses((ROOT / "pyproject.toml").read_text(encoding="utf-8"), url, tag)


def test_addresses_are_written_once():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"no \[project.urls\]"):
        add_addresses(add_addresses(text, URL, TAG), URL, TAG)


def test_an_issue_asks_for_what_is_needed():
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    forms = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in templates]
    bugs = [form for form in forms if form.get("name", "").startswith("Bug")]
    assert len(bugs) == 1
    assert "python -m mlx_sparse_nn info" in str(bugs[0])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "MIT"


def test_a_mac_runs_the_kernels_and_keeps_what_it_measured():
    job = JOBS["tests/macos"]
    assert job["runs-on"].startswith("macos-")
    for command in ("make test", "make test-device", "-m mlx_sparse_nn check --device gpu"):
        assert command in commands(job)
    (kept,) = [step["with"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert "benchmarks/results/device.json" in kept["path"].split()
