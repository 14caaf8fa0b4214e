"""Health of cooling schedules: what the notebook's table rests on."""

from moe_lab.experiments.search_schedule import schedule_health


def test_official_schedule_loses_its_gradient_and_its_permutation_default_keeps_both():
    official, default = (schedule_health(name, 16, draws=20, stages=3) for name in ("official", "default"))
    assert [row["progress"] for row in official] == [0, 0.5, 1]
    assert [row["iterations"] for row in official] == [20, 85, 150]
    assert abs(official[0]["temperature"] - 1e-3) < 1e-9 and abs(official[2]["temperature"] / 1e-7 - 1) < 1e-6
    assert official[2]["row_error"] > 0.9 and official[2]["match"] < 0.1 and official[2]["gradient"] == 0
    assert max(row["row_error"] for row in default) < 0.01
    assert min(row["gradient"] for row in default) > 0.03
    assert default[2]["soft_hard_distance"] < default[0]["soft_hard_distance"]


def test_health_depends_on_the_seed_alone():
    assert schedule_health("default", 5, draws=5, stages=2) == schedule_health("default", 5, draws=5, stages=2)
    assert schedule_health("default", 5, draws=5, stages=2) != schedule_health("default", 5, draws=5, stages=2, seed=1)
