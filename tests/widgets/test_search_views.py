"""Views of notebook 05 show what the record says, follow their slider, and are quick."""

import pytest
from matplotlib.figure import Figure
from slider_time import IN_TIME, plain_figures

from moe_lab.widgets.search import SearchReplay, sinkhorn_view


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def record(step, hardened=0.0):
    matrix = [[0.5, 0.5], [1.0, 0.0]] if not hardened else [[0.0, 1.0], [1.0, 0.0]]
    return {
        "step": step,
        "temperature": 0.1,
        "row_error": 0.25 * (1 - hardened),
        "soft_hard_distance": 0.7 * (1 - hardened),
        "hardened": hardened,
        "assignment": [1, 0],
        "matrix": matrix,
    }


def test_sinkhorn_view_writes_the_row_sums_and_says_when_the_best_assignment_is_lost():
    warm = texts(sinkhorn_view(1e-2, 500))
    assert warm.count("1.00") == 8
    assert any("same best assignment" in text for text in warm)
    cold = texts(sinkhorn_view(1e-7, 150, 16))
    assert cold.count("1.00") < 16
    assert any("another best assignment" in text for text in cold)


def test_replay_shows_the_chosen_record_and_counts_what_is_at_its_place():
    replay = SearchReplay([record(0), record(8), record(16, 1.0)], target=[1, 0], title="one search:")
    assert replay.last == 2
    soft, hard = texts(replay.view(1)), texts(replay.view(2))
    assert "step 8, τ = 0.1" in soft and "step 16, hard" in hard
    assert "one search:  2 of 2 outputs at the right expert" in soft
    assert len(replay.view(0).axes[0].images) == 1


def test_replay_of_a_run_without_search_is_refused():
    with pytest.raises(ValueError, match="nothing to replay"):
        SearchReplay([])


@pytest.mark.parametrize("view", [lambda: sinkhorn_view(1e-3, 150), lambda: sinkhorn_view(1e-7, 500)])
def test_sinkhorn_view_is_quick_enough_for_a_slider(view):
    assert plain_figures(view) < IN_TIME


def test_replay_is_quick_enough_for_a_slider():
    replay = SearchReplay([record(step) for step in range(20)])
    assert plain_figures(lambda: replay.view(7)) < IN_TIME
