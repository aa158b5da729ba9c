"""What takes minutes is part of `make torture` only: it is not skipped elsewhere, it is not chosen."""

from __future__ import annotations

import pytest

from billing_orchestration_tests.torture.extent import THOROUGH


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `thorough`, unless `make torture` asks for them."""
    if THOROUGH:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
