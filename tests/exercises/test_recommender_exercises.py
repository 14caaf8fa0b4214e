"""Checks of notebook 03 accept a right answer and say what is wrong with others."""

from types import SimpleNamespace

import pytest

from moe_lab.exercises import recommender
from moe_lab.metrics.ranking import auc

ERROR = [0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
ALONE = [True] * 5 + [False] * 3


def by_rank(score, label):
    """Ties in the order of the file."""
    rank = score.argsort(stable=True).argsort() + 1.0
    n, n_watched = len(label), int(label.sum())
    return float((rank[label == 1].sum() - n_watched * (n_watched + 1) / 2) / (n_watched * (n - n_watched)))


def trained(used, per_row):
    """Instead of a training run: what the check reads of its Result."""
    return lambda weight: SimpleNamespace(
        metrics={"used_experts": used, "experts_per_example": per_row}, config={"k": 2, "entropy_weight": weight}
    )


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (recommender.check_auc, (auc,)),
        (recommender.check_artefact, (ERROR, ALONE, 4)),
        (recommender.check_relabelling, (lambda table, permutation: permutation[table],)),
        (recommender.check_collapse, (0.003, trained(4, 3.0))),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (recommender.check_auc, (None,), "Not answered yet"),
        (recommender.check_auc, (by_rank,), "do ties count half?"),
        (recommender.check_auc, (lambda score, label: 1 - auc(score, label),), "with 1000 different scores"),
        (recommender.check_artefact, (None, ALONE, 4), "Not answered yet"),
        (recommender.check_artefact, (ERROR[:4], ALONE, 4), "equal length, not (4,) and (8,)"),
        (recommender.check_artefact, (ERROR, [False] * 8, 4), "nothing is rated"),
        (recommender.check_artefact, (ERROR, [True] * 8, 4), "batch-weighted value is 1.12, the exact one 1.12"),
        (recommender.check_relabelling, (lambda table, permutation: table,), "of 50 users reach another expert"),
        (recommender.check_relabelling, (lambda table, p: p.argsort()[table],), "of 50 users"),
        (recommender.check_collapse, (None, trained(4, 3.0)), "Not answered yet"),
        (recommender.check_collapse, (0.1, trained(2, 2.0)), "only 2 experts are in use"),
        (recommender.check_collapse, (1e-3, trained(7, 3.8)), "3.80 experts per row"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out
