"""The pipelines of docs/ci.md are what they seem: files, targets and commands that exist, in a form that is read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from billing_orchestration.cli import main

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]

ROOT = Path(__file__).parents[1]
GITHUB, GITLAB = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)


def scripts() -> Iterator[str]:
    """Every line that either of them runs."""
    for job in yaml.safe_load(GITHUB)["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)
    for job in yaml.safe_load(GITLAB).values():
        yield from job.get("script", ()) if isinstance(job, dict) else ()


def test_both_run_the_same_gates() -> None:
    github: dict[str, Any] = yaml.safe_load(GITHUB)["jobs"]
    gitlab: dict[str, Any] = yaml.safe_load(GITLAB)
    assert list(github) == gitlab["stages"]
    for gate in ("check", "plan"):
        lines = [step["run"] for step in github[gate]["steps"] if "run" in step]
        assert [line for line in gitlab[gate]["script"] if "apt-get" not in line] == lines


OURS = sorted({line.split(">")[0] for line in scripts() if "bin/billing-orchestration" in line})


@pytest.mark.parametrize("line", OURS)
def test_our_commands_are_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line.replace("$AS_OF", "2026-01-31T03:00:00Z"))[1:]

    # Help ends it after everything before was understood.
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])

    assert ended.value.code == 0
    assert f"billing-orchestration {words[0]}" in capsys.readouterr().out


def test_what_they_start_is_there() -> None:
    assert any(line == ".ci/run" for line in scripts())
    assert (ROOT / ".ci" / "run").is_file()


def test_dg_finds_the_definitions_and_the_location_that_dagster_finds() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    project = tool["dg"]["project"]
    assert tool["dg"]["directory_type"] == "project"
    assert project["code_location_target_module"] == tool["dagster"]["module_name"]
    assert project["code_location_name"] == tool["dagster"]["code_location_name"]
