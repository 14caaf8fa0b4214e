"""The README says what the recorded Results say."""

from moe_lab.experiments.summary import summary
from moe_lab.paths import project_root


def test_the_readme_holds_the_tables_that_the_recorded_results_give():
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- recorded: python -m moe_lab.experiments.summary -->\n", "\n<!-- /recorded -->"
    assert text.split(begin)[1].split(end)[0].strip() == summary()
