"""The empty job of `empty_job`, in this project's code location: beside our definitions, and loaded after them."""

import dagster as dg

from bench.empty_job import empty_job
from billing_orchestration import definitions

# Dagster wants one `Definitions` in a module: ours is not imported by its name.
defs = dg.Definitions.merge(definitions.defs, dg.Definitions(jobs=[empty_job]))
