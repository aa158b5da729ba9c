"""The stage of demo and dev: it deletes in no folder that it did not make."""

from __future__ import annotations

from pathlib import Path

import pytest

from billing_orchestration.sandbox.stage import StageError, open_stage


@pytest.mark.parametrize("linked", [False, True])
def test_a_data_folder_that_the_demo_did_not_make_is_left_alone(tmp_path: Path, linked: bool) -> None:
    somebodys = tmp_path / ("elsewhere" if linked else ".demo")
    (somebodys / "logs").mkdir(parents=True)
    (somebodys / "logs" / "of-last-year").touch()
    if linked:
        (tmp_path / ".demo").symlink_to(somebodys)
    with pytest.raises(StageError, match="was not made by this demo"), open_stage(tmp_path, fresh=True):
        pass
    assert [path.name for path in somebodys.rglob("*")] == ["logs", "of-last-year"]
