"""Every notebook also runs with another seed, within its time: nothing hangs on the numbers that happen to be stored.

With the stored parameters the notebooks and their solutions are run by nbval (`make test`), which compares the claims.
"""

import pytest

from moe_lab.notebook_catalogue import find_notebooks
from moe_lab.notebook_parameters import check_parameters
from moe_lab.notebook_runner import run_notebook

BUDGET_SECONDS = 90  # on an idle 2-core machine
SLACK = 3  # CI machines are slower, and two tests run at once


@pytest.mark.timeout(BUDGET_SECONDS * (SLACK + 1))
@pytest.mark.parametrize("notebook", find_notebooks(), ids=lambda notebook: notebook.name)
def test_notebook_runs_with_another_seed_in_its_time(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_LAB_RUNS", str(tmp_path / "runs"))  # so that everything is computed
    outcome = run_notebook(notebook, check_parameters(notebook, [("seed", "1")]), tmp_path)
    assert outcome.status == "finished", outcome.error
    assert outcome.seconds < BUDGET_SECONDS * SLACK
