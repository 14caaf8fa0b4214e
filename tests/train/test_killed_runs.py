"""A run that is killed (SIGKILL) and resumed gives bit for bit what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import killed_runs
import pytest

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "MOE_LAB_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, killed_runs.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


def test_the_undisturbed_run_did_train(report):
    metrics = report["reference"]["result"]["metrics"]
    losses = [row["valid_loss"] for row in report["reference"]["result"]["curves"]["epochs"]]
    assert metrics["steps"] == 24 and len(losses) == 3 and metrics["best_value"] == min(losses)
    assert report["reference"]["files"] == [name for name in report["reference"]["files"] if name.endswith(".json")]


@pytest.mark.parametrize("where", [*killed_runs.SCENARIOS, "at six random moments, from outside"])
def test_a_killed_run_resumes_to_the_same_bits(report, where):
    killed, reference = report[where], report["reference"]
    assert killed["exits"][0] == -signal.SIGKILL and killed["exits"][-1] == 0
    assert killed["result"] == reference["result"]
    assert killed["files"] == reference["files"]  # nothing left behind: no checkpoint, no temporary file
