"""Power: the loop around a step, on a CPU and with planted sensors. On CUDA also the sensors themselves."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from moe_lab.bench import gpu, gpu_power
from moe_lab.bench.gpu import GpuBenchConfig, TablesFailed, run
from moe_lab.bench.gpu_cases import MoeBench
from moe_lab.bench.gpu_power import Reading, measure_power, rested_ms, sensors, under_load
from moe_lab.bench.gpu_problem import Problem, Shape
from moe_lab.experts import kernels

CPU = torch.device("cpu")
TINY = Shape(tokens=24, width=8, hidden=16, experts=4, k=2)


class Clock:
    """Time that passes in steps only: 10 ms each."""

    def __init__(self, monkeypatch):
        self.now, self.steps = 0.0, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self):
        self.now, self.steps = self.now + 0.01, self.steps + 1


def test_only_the_second_half_is_counted_and_sensors_are_read_now_and_then(monkeypatch):
    clock, read_at = Clock(monkeypatch), []

    def read():
        read_at.append(clock.now)
        return Reading(1500 + len(read_at), 700.0)

    found = under_load(clock.step, CPU, read, seconds=4.0, every=0.1)
    assert clock.steps in (400, 401) and min(read_at) > 2.0
    assert 18 <= len(read_at) <= 21 and min(b - a for a, b in itertools.pairwise(read_at)) > 0.095
    assert found["ms"] == pytest.approx(10) and found["watts"] == 700 and found["joules"] == pytest.approx(7)
    assert found["mhz"] == 1500 + (1 + len(read_at)) / 2  # the median


def test_a_step_longer_than_the_time_is_timed_all_the_same(monkeypatch):
    clock = Clock(monkeypatch)
    assert under_load(clock.step, CPU, seconds=0.001)["ms"] == pytest.approx(10) and clock.steps == 2


def test_a_cpu_has_no_sensors_and_every_case_a_row():
    assert sensors(CPU) is None
    rows = measure_power(Problem(TINY, "cpu"), zeros=True, seconds=0.02)
    assert [row["case"] for row in rows] == ["dense", "ours", "plain", *gpu_power.ZEROS]
    for row in rows:
        assert row["ms"] > 0 and row["rested_ms"] > 0 and row["tokens"] == 24
        assert row["mhz"] is row["watts"] is row["joules"] is None and row["graph"] is False


def test_zeros_are_as_many_as_they_say(monkeypatch):
    """What is multiplied, seen through a step that is called once."""
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w: products.append(x) or mm(x, w))
    for name, step in gpu_power._steps(Problem(Shape(512, 32, 16, 4, 2), "cpu"), zeros=True):
        if name in gpu_power.ZEROS:
            step()
    shares = [(x == 0).double().mean().item() for x in products]
    assert shares[0] == 0 and shares[2] == 1 and shares[1] == pytest.approx(7 / 8, abs=0.01)


@pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")
def test_the_table_is_recorded_for_every_shape(tmp_path):
    found = run(GpuBenchConfig(("power",), "cpu", MoeBench()), root=tmp_path)
    rows = found.curves["power"]
    assert [(row["case"], row["k"]) for row in rows if row["case"] in ("dense", "ours")] == [
        ("dense", 2), ("ours", 2), ("dense", 1), ("ours", 1),
    ]  # fmt: skip
    assert sum(row["case"] in gpu_power.ZEROS for row in rows) == len(gpu_power.ZEROS)


@pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter is for the tests of the kernels")
def test_without_its_sensors_the_table_fails_only_where_it_was_asked_for(tmp_path, monkeypatch, capsys):
    def missing(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(gpu, "sensors", missing)
    monkeypatch.setattr(gpu, "TABLES", {"power": gpu.TABLES["power"]})
    found = run(GpuBenchConfig((), "cpu"), root=tmp_path)
    assert found.finished and all(row["watts"] is None for row in found.curves["power"])
    assert "without clock and watts: nvidia-ml-py" in capsys.readouterr().out
    with pytest.raises(TablesFailed, match="nvidia-ml-py"):
        run(GpuBenchConfig(("power",), "cpu"), root=tmp_path)


def test_a_rested_step_is_the_median_of_several():
    assert rested_ms(lambda: torch.ones(8) + 1, CPU, rest=0, times=3) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_under_load_draws_more():
    pytest.importorskip("pynvml")
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.randn(4096, 4096, device="cuda").bfloat16()
    read = sensors(device)
    idle = read()
    loaded = under_load(lambda: x @ x, device, read, seconds=3.0)
    assert 0 < loaded["mhz"] < 5000 and loaded["watts"] > idle.watts
    assert loaded["ms"] > 2 * 4096**3 / 3e15 * 1e3  # nothing does 3 PFLOP/s
