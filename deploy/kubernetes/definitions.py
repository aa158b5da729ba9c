"""The code location for Kubernetes: each of autopayment_job's shards is a Kubernetes job of its own.

    dagster api grpc -f deploy/kubernetes/definitions.py -h 0.0.0.0 -p 4000 --location-name billing

Where and with which rights they run is the chart's (values.yaml): without config, they run as their run's pod does.
At most RENEWAL_SHARDS_AT_ONCE run at once.
"""

from dagster_k8s import k8s_job_executor

from billing_orchestration.definitions import build_definitions
from billing_orchestration.settings import renewal_sharding

_SHARDS, _AT_ONCE = renewal_sharding()

defs = build_definitions(
    executor=k8s_job_executor.configured({"max_concurrent": _AT_ONCE or _SHARDS or 1}) if _SHARDS else None
)
