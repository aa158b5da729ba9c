"""One file a job: its config, its ops, the job, its partitions and its schedule."""
