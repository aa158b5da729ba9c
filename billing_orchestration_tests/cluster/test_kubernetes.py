"""deploy/kubernetes loads as a team deploys it. Nothing here starts a pod: that needs a cluster."""

from __future__ import annotations

import runpy
from pathlib import Path

import dagster as dg
import pytest

HERE = Path(__file__).parents[2] / "deploy" / "kubernetes"


def definitions() -> dg.Definitions:
    loaded = runpy.run_path(str(HERE / "definitions.py"))["defs"]
    assert isinstance(loaded, dg.Definitions)
    return loaded


def test_each_shard_is_a_job_of_its_own_and_at_most_so_many_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENEWAL_SHARDS", "16")
    monkeypatch.setenv("RENEWAL_SHARDS_AT_ONCE", "4")

    executor = definitions().get_job_def("autopayment_job").executor_def

    assert executor.name == "k8s"
    assert executor.get_requirements({}) == dg.multiple_process_executor_requirements()
    config = executor.config_schema.resolve_config({})
    assert config.value is not None
    assert config.value["config"]["max_concurrent"] == 4


def test_runs_that_are_not_divided_stay_in_their_pod() -> None:
    assert definitions().get_job_def("autopayment_job").executor_def.name == "in_process"
