"""No proxy and no certificates of the machine's in the tests of the client."""

from __future__ import annotations

import pytest

_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_dir", "ssl_cert_file", "curl_ca_bundle")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator has set for the machine means nothing here."""
    for name in (*_NAMES, "requests_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
