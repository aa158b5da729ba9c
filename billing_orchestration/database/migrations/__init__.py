"""The schema `billing_orchestration`, version by version. `database/migrating.py` runs it."""
