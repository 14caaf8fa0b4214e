"""Views of notebook 01 show what the gate and the record say, and are quick."""

import pytest
from slider_time import IN_TIME, plain_figures

from moe_lab.results import Result
from moe_lab.widgets.gates import ConfusionReplay, weights_view


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def result(tmp_path, n_rows=3):
    result = Result.open("toy", {"gate": "topk"}, root=tmp_path)
    for index in range(n_rows):
        result.log("epochs", step=8 * index, purity=0.5 + 0.1 * index, used=2 - (index > 0))
        result.log("confusion", step=8 * index, table=[[10 - index, index], [0, 10]])
    return result


def test_an_expert_that_runs_has_a_number_also_where_it_reads_zero():
    sharp = texts(weights_view(scale=8.0, k=2))
    assert "softmax: 30 of 30 expert runs" in sharp and "top-2: 10 of 30" in sharp
    assert sum(text.replace(".", "").isdigit() for text in sharp) == 30 + 10
    assert sharp.count("0.00") > 10


def test_top_k_with_all_experts_is_softmax():
    numbers = [text for text in texts(weights_view(scale=1.0, k=6)) if text.replace(".", "").isdigit()]
    assert numbers[:30] == numbers[30:]


def test_replay_shows_the_chosen_evaluation(tmp_path):
    replay = ConfusionReplay({"topk": result(tmp_path)})
    assert replay.last == 2
    assert "topk, step 8: purity 0.60" in texts(replay.view("topk", 1))
    assert "topk, step 16: purity 0.70" in texts(replay.view("topk"))
    image = replay.view("topk", 1).axes[0].images[0].get_array()
    assert image.tolist() == [[0.9, 0.1], [0.0, 1.0]]


def test_records_of_different_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        ConfusionReplay({"a": result(tmp_path / "a", 2), "b": result(tmp_path / "b", 3)})


def test_views_are_quick_enough_for_a_slider(tmp_path):
    replay = ConfusionReplay({"topk": result(tmp_path)})
    for view in (lambda: weights_view(3.0, 2), lambda: replay.view("topk", 1)):
        assert plain_figures(view) < IN_TIME
