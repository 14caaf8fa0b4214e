"""Claims of the JEI-DNN paper from Results whose numbers are known."""

import pytest

from moe_lab.experiments.compare import mean_difference
from moe_lab.experiments.jei_claims import (
    accuracy_claims,
    control_claims,
    difference,
    joint_claims,
    on_what,
    settings,
    uncertainty_claims,
)
from moe_lab.experiments.jei_config import JeiConfig
from moe_lab.results import Result


def point(method, cost, accuracy, **changes):
    row = {"ece": 0.02, "ece_per_batch": 0.15, "ece_double_softmax": 0.6, "coverage": 0.95, "set_size": 2.0}
    return {"method": method, "setting": cost, "cost": cost, "accuracy": accuracy, **row, **changes}


def result(tmp_path, seed=0, mode="released", ahead=0.02, **changes):
    """The geometric baseline climbs from 0.5 at cost 0.2 to 0.9 at cost 1; the learned gates are ``ahead`` of it."""
    found = Result.open("jei_dnn", JeiConfig.profile("quick", seed=seed, mode=mode), root=tmp_path)
    rows = [point(name, cost, 0.4 + cost / 2) for name in ("geometric", "shared") for cost in (0.2, 1.0)]
    rows += [point("jei_dnn", cost, 0.4 + cost / 2 + ahead, **changes) for cost in (0.4, 0.8)]
    found.curves["points"] = rows
    found.metrics = {"title": "planted"}
    return found


def test_a_gain_is_judged_over_seeds(tmp_path):
    runs = [result(tmp_path, seed, ahead=0.01 * (seed + 1)) for seed in range(3)]
    table = accuracy_claims(runs)
    assert (
        table["we measured"].iloc[0].startswith("+2.0 points [+1.0")
        and table["does it hold?"].iloc[0] == "yes, in sign"
    )
    assert table["on what"].iloc[0] == "planted, vit, 3 seeds" == on_what(runs)
    assert len(table) == 3  # geometric, with and without the price 0, and shared; no points, no row
    one = accuracy_claims(runs[:1])
    assert one["does it hold?"].iloc[0] == "inconclusive (1 seed)"


def test_the_price_0_can_be_left_out(tmp_path):
    run = result(tmp_path)
    run.curves["points"].append({**point("jei_dnn", 0.6, 0.4 + 0.3 - 0.1), "setting": 0.0})
    assert difference([run], "geometric", "accuracy").mean == pytest.approx((0.02 + 0.02 - 0.1) / 3)
    assert difference([run], "geometric", "accuracy", priced_only=True).mean == pytest.approx(0.02)


def test_the_published_ece_comparison_shows_its_artefact(tmp_path):
    """Both sides are equally calibrated; per batch against softmax twice the learned gates look far better."""
    runs = [result(tmp_path, seed) for seed in range(3)]
    table = uncertainty_claims(runs).set_index("paper claims")
    honest, published, smaller, covers = (table.iloc[index] for index in range(4))
    assert honest["we measured"].startswith("ECE +0.0") and honest["does it hold?"] == "inconclusive"
    assert published["we measured"].startswith("ECE -45.0 points") and published["does it hold?"] == "yes, in sign"
    assert smaller["we measured"].startswith("+0.00 classes") and covers["does it hold?"] == "yes"
    wide = uncertainty_claims([result(tmp_path, seed, set_size=3.0, coverage=0.9) for seed in range(3)])
    assert wide["does it hold?"].tolist()[2:] == ["no: the other way round", "no"]


def test_modes_are_compared_seed_by_seed(tmp_path):
    runs = [result(tmp_path, seed, ahead=0.1 * seed) for seed in range(3)]
    runs += [result(tmp_path, seed, "detached", ahead=0.1 * seed - 0.02) for seed in range(3)]
    runs += [result(tmp_path, 7, "single")]  # no partner
    table = joint_claims(runs)
    assert table["we measured"].tolist() == ["-2.0 points [-2.0, -2.0]"]
    assert table["does it hold?"].tolist() == ["no: the other way round"]
    assert [len(group) for group in settings(runs)] == [3, 3, 1]


def test_the_authors_control_is_judged_by_its_own_gain(tmp_path):
    runs = [result(tmp_path, seed) for seed in range(3)]
    for run, value in zip(runs, (0.02, 0.03, 0.025), strict=True):
        run.metrics["gain_over_constant"] = value
    (row,) = control_claims(runs).to_dict("records")
    assert "+2.5 points [+2.0, +3.0]" in row.values() and "yes, in sign" in row.values()
    for run in runs:
        run.metrics["gain_over_constant"] = None
    assert control_claims(runs).empty


def test_no_difference_without_a_common_cost(tmp_path):
    found = result(tmp_path)
    found.curves["points"] = [row for row in found.curves["points"] if row["method"] != "shared"]
    assert difference([found], "shared", "accuracy") is None
    with pytest.raises(ValueError, match="no difference"):
        mean_difference([])
