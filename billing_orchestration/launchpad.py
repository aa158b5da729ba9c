"""Links into the Dagster UI: a launchpad that opens filled in, with nothing to copy.

They begin with the path of DAGSTER_UI_URL and name no host: the UI may be open under several names. An alert puts the
whole address before them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

# The name of the code location in workspace.yaml.
LOCATION = "billing"


def launchpad(
    job: str,
    config: Mapping[str, Any] | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    location: str = LOCATION,
    prefix: str = "",
) -> str:
    """The launchpad of a job, with this run config in its editor and these tags."""
    page = f"{prefix}/locations/{quote(location, safe='')}/jobs/{quote(job)}/playground"
    query = [("config", as_yaml(config))] if config else []
    for number, (name, value) in enumerate((tags or {}).items()):
        query += [(f"tags[{number}][key]", name), (f"tags[{number}][value]", value)]
    return f"{page}/setup?{urlencode(query)}" if query else page


def asset_page(name: str, *, prefix: str = "", view: str = "overview") -> str:
    """The page of an asset of ours."""
    return f"{prefix}/assets/billing/{quote(name)}?view={view}"


def run_option(name: str, value: Any) -> dict[str, Any]:
    """The run config with one option of the resource `run`."""
    return {"resources": {"run": {"config": {name: value}}}}


def as_yaml(config: Mapping[str, Any]) -> str:
    """A run config as the launchpad's editor shows it."""
    return "".join(f"{line}\n" for line in _lines(config, ""))


def _lines(config: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}"  # JSON is YAML
