"""`make demo` as a whole process: what a newcomer sees must be what is promised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_ends_with_every_case_as_expected_and_a_good_verdict(tmp_path: Path) -> None:
    # A blank in the path, as in many a home folder.
    folder = tmp_path / "a place"
    (folder / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "dagster.yaml", folder / "deploy")
    # The embedded server cannot live under such a path: then its data is in the system's temporary folder.
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as elsewhere:
        demo = subprocess.run(
            [sys.executable, "-m", "billing_orchestration.sandbox.demo"],
            cwd=folder,
            # A setting of the caller's own must not reach the demo.
            env={
                **os.environ,
                "BILLING_DATABASE_URL": "postgresql://nobody@nowhere.invalid/production",
                "TMPDIR": elsewhere,
            },
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
    assert demo.returncode == 0, demo.stdout[-6000:] + demo.stderr[-3000:]
    assert "✗" not in demo.stdout
    assert "VERDICT: both sides agree" in demo.stdout
    assert "all five jobs, run again, change nothing on either side" in demo.stdout
    assert (folder / ".demo" / "complete").is_file()
