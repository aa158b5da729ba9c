"""A bare client, and a saved method to charge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[BareClient]:
    sandbox.provider.add_method("method-1")
    bare = BareClient(sandbox)
    yield bare
    bare.http.clear()
