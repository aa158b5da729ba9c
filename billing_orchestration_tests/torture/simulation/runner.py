"""The jobs' own ops, run one after another without Dagster's machinery: 0.3 s of bookkeeping a run become 0.2 ms.

Which ops a job consists of, in which order, and whose output is whose input, is read from the job itself. An op gets
what Dagster would give it (its config, its upstream's output, the resources it names) and a context that collects what
it reports. A share of the simulation's runs goes through whole Dagster all the same (`world`).
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import dagster as dg
from dagster._core.execution.context.compute import current_execution_context


@dataclass
class _Run:
    tags: dict[str, str]
    run_config: Mapping[str, Any]
    # As of a run that no code location has launched.
    remote_job_origin: None = None


@dataclass
class _Instance:
    run_tags: dict[str, str]

    def add_run_tags(self, _run_id: str, tags: Mapping[str, str]) -> None:
        self.run_tags.update(tags)

    def get_run_by_id(self, _run_id: str) -> None:
        """Nobody terminates a run here."""

    def fetch_materializations(self, *_: Any, **__: Any) -> dg.EventRecordsResult:
        """No plots are kept here."""
        return dg.EventRecordsResult(records=[], cursor="", has_more=False)


class _Log:
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def info(self, text: str) -> None:
        self._lines.append(text)

    debug = warning = error = info


@dataclass
class Context:
    """What the ops use of Dagster's context. Anything else is an AttributeError, which the simulation reports."""

    run_id: str
    job_def: dg.JobDefinition
    tags: dict[str, str]
    partition: dg.TimeWindow | None
    lines: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    run_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def op_execution_context(self) -> Context:
        """What `OpExecutionContext.get()` returns in the op."""
        return self

    @property
    def job_name(self) -> str:
        return self.job_def.name

    @property
    def instance(self) -> _Instance:
        return _Instance(self.tags)

    @property
    def log(self) -> _Log:
        return _Log(self.lines)

    @property
    def run(self) -> _Run:
        return _Run(self.tags, self.run_config)

    @property
    def has_partition_key(self) -> bool:
        return self.partition is not None

    @property
    def partition_time_window(self) -> dg.TimeWindow:
        assert self.partition is not None
        return self.partition

    def add_output_metadata(self, metadata: Mapping[str, Any]) -> None:
        self.metadata.update(metadata)

    def log_event(self, event: Any) -> None:
        self.events.append(event)


@dataclass
class RunEnd:
    """How a run ended. `failure` is the text of a red run, `crash` an exception that no run may end with."""

    run_id: str
    failure: str | None = None
    crash: BaseException | None = None
    metadata: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.failure is None and self.crash is None

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The rows of every decisions table that the ops attached, the applying op's last."""
        return [
            dict(record.data)
            for attached in self.metadata
            for name, value in attached.items()
            if name.startswith("decisions")
            for record in value.records
        ]


def run_ops(
    job: dg.JobDefinition,
    resources: Mapping[str, Any],
    *,
    op_config: Mapping[str, Mapping[str, Any]] | None = None,
    tags: Mapping[str, str] | None = None,
    partition: dg.TimeWindow | None = None,
) -> RunEnd:
    """Run every op of the job. Ends as Dagster would: red on dg.Failure; whatever else is raised is a crash.

    A BaseException that is no Exception (the simulation's kill) passes through.
    """
    end = RunEnd(str(uuid.uuid4()))
    results: dict[tuple[str, str], Any] = {}
    op_config = op_config or {}
    run_config = {"ops": {name: {"config": config} for name, config in op_config.items()}}
    tags = dict(tags or {})
    if partition is not None and isinstance(job.partitions_def, dg.TimeWindowPartitionsDefinition):
        tags["dagster/partition"] = partition.start.strftime(job.partitions_def.fmt)
    upstream = job.graph.dependency_structure
    for node in job.nodes_in_topological_order:
        inputs = {
            wanted.input_name: (sources[0].node_name, sources[0].output_def.name)
            for wanted, sources in upstream.input_to_upstream_outputs_for_node(node.name).items()
        }
        if not set(inputs.values()) <= set(results):
            continue  # what it waits for was not yielded: Dagster skips it as well
        context = Context(end.run_id, job, tags, partition, run_config=run_config)
        given = {**resources, **{name: results[output] for name, output in inputs.items()}}
        token = current_execution_context.set(context)  # type: ignore[arg-type]
        try:
            for output, value in _run_op(node, context, op_config.get(node.name, {}), given):
                results[node.name, output] = value
        except dg.Failure as failure:
            end.failure = failure.description or "without a word"
            end.metadata.append(failure.metadata)
            return end
        except Exception as error:  # noqa: BLE001 - told as a fault of the code under test
            end.crash = error
            return end
        finally:
            current_execution_context.reset(token)
            end.metadata.append(context.metadata)
    return end


def _run_op(
    node: Any, context: Context, config: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Call the op's function with what its parameters name; its outputs by name."""
    compute: Any = node.definition.compute_fn.decorated_fn
    arguments = {
        name: context
        if name == "context"
        else get_type_hints(compute)["config"](**config)
        if name == "config"
        else given[name]
        for name in inspect.signature(compute).parameters
    }
    returned = compute(**arguments)
    if not inspect.isgenerator(returned):
        yield "result", returned
        return
    for yielded in returned:
        if isinstance(yielded, dg.Output):
            yield yielded.output_name, yielded.value
            context.metadata.update(yielded.metadata)
        else:
            context.events.append(yielded)
