"""What the deployment and its Celery workers agree on. Workers read it by its name, from the code server's own folder:

    PYTHONPATH=deploy/celery celery -A dagster_celery.app worker -Q dagster -c 1

A shard that dies with its worker is started again by another one. That is safe: what was sent keeps its key.
"""

import os

broker_url = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")
result_backend = os.environ.get("CELERY_RESULT_BACKEND", broker_url)
# Acknowledged when it is done: otherwise a shard is lost with its worker, and its run waits for it until max_runtime.
task_acks_late = True
task_reject_on_worker_lost = True
worker_prefetch_multiplier = 1
# After so many seconds without an acknowledgement another worker takes a shard over. Longer than the longest shard, or
# two workers are at one (which charges nobody twice, and is of no use).
broker_transport_options = {"visibility_timeout": int(os.environ.get("CELERY_VISIBILITY_TIMEOUT_S", "3600"))}
