"""The code location for Celery: autopayment_job's shards run on the workers, everything else in the run's own process.

    dagster api grpc -f deploy/celery/definitions.py -d deploy/celery -h 0.0.0.0 -p 4000 --location-name billing

Workers have the code server's settings and this folder. RENEWAL_SHARDS_AT_ONCE: all workers' processes together.
"""

import dagster_celery_config as celery
from dagster_celery import celery_executor

from billing_orchestration.definitions import build_definitions

defs = build_definitions(
    executor=celery_executor.configured(
        {
            "broker": celery.broker_url,
            "backend": celery.result_backend,
            "config_source": {"broker_transport_options": celery.broker_transport_options},
        }
    )
)
