"""One file a version. `health.REVISIONS` lists them in their order."""
