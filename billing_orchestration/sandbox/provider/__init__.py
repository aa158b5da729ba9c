"""The provider's sandbox: its account, its HTTP API, and how it misbehaves on request."""
