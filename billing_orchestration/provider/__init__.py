"""The payment provider over HTTP: timeouts, keys, JSON to records, and one tree of errors about the money."""
