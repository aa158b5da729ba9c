"""The empty job of `empty_job`, in this project's code location: beside our definitions, and loaded after them."""

import dagster as dg

from bench.empty_job import empty_job
from billing_orchestration.definitions import defs as ours

defs = dg.Definitions.merge(ours, dg.Definitions(jobs=[empty_job]))
