"""``python -m moe_lab.bench cpu``: training speed of the MovieLens architecture and of a small GPT with each gate, and
what early exits save in inference. ``--tables exits language``: these tables only.

The comparison to beat: the COMET authors' TensorFlow gates in the same architecture did about 12,000 examples/s with
COMET and 15,000 with top-k on two idle cores. How ours is faster is written where it happens: experts run only where
routed (`experts.dispatch`), stacked weights without full-size zeros (`experts.grouped`), one random byte per dropout
decision (`experts.dropout`), trees level by level (`gates.comet`), fused Adam (`models.optim`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moe_lab.bench.exit_cases import ExitBench, exit_rows
from moe_lab.bench.exit_training import ExitTrainingBench, training_rows
from moe_lab.bench.language_cases import DENSE, LanguageBench, LanguageStep, language_gates
from moe_lab.bench.recommender import BATCH, GateStep, TrainingStep, gate_makers, gate_multiply_adds
from moe_lab.bench.tables import render
from moe_lab.bench.timing import take_turns
from moe_lab.names import check_name
from moe_lab.results import Result
from moe_lab.runtime import configure_threads, environment


@dataclass(frozen=True)
class CpuBenchConfig:
    """What to time.

    Attributes:
        k: trees, selectors or chosen experts in the first two tables.
        ks: values of k for the third.
        batch: rows per step.
        rounds, steps: each case gets ``rounds`` turns of ``steps`` timed steps.
        threads: of PyTorch; None: the project's default (`runtime.configure_threads`).
        embedding_updates: "dense" or "lazy", see `models.optim`.
        language: the GPT of the fourth table, with rounds and steps of its own: a step takes 20 times as long.
        exits: the networks of the fifth, likewise.
        exit_training: the network of the sixth.
        tables: which ones, of `TABLES`; empty: all.
    """

    k: int = 2
    ks: tuple[int, ...] = (2, 4, 8)
    batch: int = BATCH
    rounds: int = 12
    steps: int = 8
    threads: int | None = None
    embedding_updates: str = "dense"
    language: LanguageBench = field(default_factory=LanguageBench)
    exits: ExitBench = field(default_factory=ExitBench)
    exit_training: ExitTrainingBench = field(default_factory=ExitTrainingBench)
    tables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.tables:
            check_name("table", name, TABLES)
        if self.rounds * self.steps < 2:
            raise ValueError("quartiles need at least two timed steps: raise rounds or steps")


def training_table(config: CpuBenchConfig) -> list[dict]:
    """Steps/s and examples/s of training, and the experts executed per example, for each gate."""
    options = {"embedding_updates": config.embedding_updates, "batch": config.batch}
    cases = {name: TrainingStep(make, **options) for name, make in gate_makers(config.k).items()}
    timings = take_turns(cases, rounds=config.rounds, steps=config.steps)
    return [
        {"gate": name, "experts": case.experts_per_example, **timings[name].row(config.batch)}
        for name, case in cases.items()
    ]


def gate_table(config: CpuBenchConfig) -> list[dict]:
    """Forward and backward of one gate alone, beside its dense multiply-adds per example."""
    cases = {name: GateStep(make, batch=config.batch) for name, make in gate_makers(config.k).items()}
    timings = take_turns(cases, rounds=config.rounds, steps=config.steps)
    return [
        {"gate": name, "multiply_adds": gate_multiply_adds(name, config.k), **timings[name].row()} for name in cases
    ]


def experts_table(config: CpuBenchConfig) -> list[dict]:
    """Experts executed per example (two gates together), and the step time, against k."""
    options = {"embedding_updates": config.embedding_updates, "batch": config.batch}
    names = ("topk", "comet, converged")
    cases = {(name, k): TrainingStep(gate_makers(k)[name], **options) for k in config.ks for name in names}
    timings = take_turns(cases, rounds=config.rounds, steps=config.steps)
    return [
        {"gate": name, "k": k, "experts": case.experts_per_example, **timings[name, k].row(config.batch)}
        for (name, k), case in cases.items()
    ]


def language_table(config: CpuBenchConfig) -> list[dict]:
    """Tokens/s of training a small GPT with each gate, and speed and FLOPs as multiples of the dense model's."""
    language = config.language
    cases = {name: LanguageStep(make, language) for name, make in language_gates(language).items()}
    timings = take_turns(cases, rounds=language.rounds, steps=language.steps, warm_up=1)
    rows = []
    for name, case in cases.items():
        row = timings[name].row(language.tokens)
        row["tokens_per_s"] = row.pop("examples_per_s")
        row["relative_speed"] = timings[DENSE].median / timings[name].median
        row["relative_flops"] = case.flops / cases[DENSE].flops
        rows.append({"gate": name, "experts": case.experts_per_token, **row})
    return rows


def exits_table(config: CpuBenchConfig) -> list[dict]:
    """Speed-up of stopping early, beside the ratio of multiply-adds."""
    return exit_rows(config.exits)


def exit_training_table(config: CpuBenchConfig) -> list[dict]:
    """Training of exits on whole networks and on cached features."""
    return training_rows(config.exit_training)


_SPEED = ("examples_per_s", "examples/s", ",.0f")
_TIME = [("ms", "ms/step", ".2f"), ("ms_q1", "q1", ".2f"), ("ms_q3", "q3", ".2f"), ("cpu_ms", "cpu ms", ".2f")]
_GATE = ("gate", "gate", "")
_EXPERTS = ("experts", "experts/example", ".2f")
TABLES = {
    "training": (
        "Training: forward, backward, Adam; two gates",
        training_table,
        [_GATE, _EXPERTS, ("steps_per_s", "steps/s", ".1f"), _SPEED, *_TIME],
    ),
    "gates": (
        "One gate alone, forward and backward",
        gate_table,
        [_GATE, ("multiply_adds", "multiply-adds/example", ","), *_TIME],
    ),
    "experts": (
        "Experts executed against k (of 16, both gates together)",
        experts_table,
        [_GATE, ("k", "k", "d"), _EXPERTS, _SPEED, *_TIME],
    ),
    "language": (
        "Training a small GPT: forward, backward, AdamW; speed and FLOPs: dense = 1",
        language_table,
        [
            _GATE,
            ("experts", "experts/token", ".2f"),
            ("tokens_per_s", "tokens/s", ",.0f"),
            ("relative_speed", "speed", ".2f"),
            ("relative_flops", "FLOPs", ".2f"),
            *_TIME,
        ],
    ),
    "exits": (
        "Early exits, milliseconds per call; speed-up: full / predict; reached: speed-up / ratio of multiply-adds",
        exits_table,
        [
            ("network", "network", ""),
            ("batch", "batch", "d"),
            ("plain_ms", "plain", ".2f"),
            ("full_ms", "full", ".2f"),
            ("predict_ms", "predict", ".2f"),
            ("nobody_ms", "nobody leaves", ".2f"),
            ("ratio", "ratio", ".2f"),
            ("speed_up", "speed-up", ".2f"),
            ("reached", "reached", ".2f"),
            ("reached_cpu", "in cpu time", ".2f"),
            ("over_plain", "over plain", ".2f"),
        ],
    ),
    "exit_training": (
        "Training of exits on a frozen backbone; faster: whole network's epoch / this one, for as many prices",
        exit_training_table,
        [
            ("case", "case", ""),
            ("prices", "prices", "d"),
            ("ms", "ms/step", ".2f"),
            ("epoch_s", "epoch, s", ".2f"),
            ("cache_s", "once, s", ".2f"),
            ("faster", "faster", ".1f"),
        ],
    ),
}


def run(config: CpuBenchConfig, *, root: Path | str | None = None, command: str = "") -> Result:
    """Measure, print the tables, and write a Result (experiment ``bench_cpu``, one curve per table).

    Always measures anew: a finished Result of the same config is replaced.
    """
    threads = configure_threads(config.threads)
    result = Result.open("bench_cpu", config, root=root, recompute=True)
    where = environment()
    print(f"{where['device']}, {where['cpu_count']} cores, {threads} threads, torch {where['torch']}, {command}")
    tables = {name: TABLES[name] for name in TABLES if name in (config.tables or TABLES)}
    if tables.keys() & {"training", "gates", "experts"}:
        print(
            f"MovieLens architecture, batch {config.batch}, k = {config.k}, {config.embedding_updates} embedding "
            f"updates, {config.rounds} x {config.steps} steps"
        )
    if "language" in tables:
        print(f"GPT: {config.language}")
    if "exits" in tables:
        print(f"Early exits: {config.exits}")
    if "exit_training" in tables:
        print(f"Training of exits: {config.exit_training}")
    print("median of rounds x steps, cases taking turns; q1, q3: quartiles; cpu: all threads\n")
    with result.recording():
        for curve, (title, measure, columns) in tables.items():
            rows = measure(config)
            for row in rows:
                result.log(curve, **row)
            print(f"{title}\n{render(rows, columns)}\n", flush=True)
        result.finish(_metrics(result) | {"command": command})
    print(f"written to {result.path}")
    return result


def _metrics(result: Result) -> dict[str, float]:
    def rows(curve: str) -> list[dict]:
        return result.curves.get(curve, [])

    metrics = {f"examples_per_s/{row['gate']}": row["examples_per_s"] for row in rows("training")}
    metrics |= {f"tokens_per_s/{row['gate']}": row["tokens_per_s"] for row in rows("language")}
    metrics |= {f"cached_faster/{row['prices']} prices": row["faster"] for row in rows("exit_training")[1:]}
    return metrics | {f"reached/{row['network']}, batch {row['batch']}": row["reached"] for row in rows("exits")}
