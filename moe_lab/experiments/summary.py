"""The README's table of what was measured, computed from the recorded Results; a test keeps the two equal.

python -m moe_lab.experiments.summary
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lab.experiments import comet_bert_tables as bert
from moe_lab.experiments.comet_bert_claims import bert_claims
from moe_lab.experiments.comet_summary import comet_summary
from moe_lab.experiments.compare import markdown, over_seeds, readable, scores
from moe_lab.experiments.evomoe_claims import language_claims, masked_claims, same_setting, translation_claims
from moe_lab.experiments.evomoe_language import LanguageConfig, training_curve
from moe_lab.experiments.evomoe_masked import MaskedConfig
from moe_lab.experiments.evomoe_translation import TranslationConfig
from moe_lab.experiments.jei_claims import accuracy_claims, control_claims, joint_claims, uncertainty_claims
from moe_lab.experiments.jei_config import ABLATIONS, JeiConfig
from moe_lab.experiments.mixture_config import GATES, MixtureConfig
from moe_lab.experiments.speed_claims import CLAIMS as SPEED
from moe_lab.experiments.speed_claims import recorded_curve, speed_claims
from moe_lab.experiments.speed_tables import moe_table
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results

_EVOMOE: dict[str, type[MixtureConfig]] = {
    "evomoe_language": LanguageConfig,
    "evomoe_masked": MaskedConfig,
    "evomoe_translation": TranslationConfig,
}


def main_evomoe_runs(experiment: str, profile: str = "standard") -> list[Result]:
    """Recorded runs of an EvoMoE experiment: one per gate and seed, gates in the order of `GATES`.

    Args:
        experiment: "evomoe_language", "evomoe_masked" or "evomoe_translation".
        profile: whose settings; "paper": the language models of a GPU.
    """
    settings = _EVOMOE[experiment].profile(profile)
    found = same_setting(find_results(experiment, root=recorded_dir()), settings)
    return sorted(found, key=lambda result: (GATES.index(result.config["gate"]), result.seed))


def bert_summary() -> list[str]:
    """Paragraphs: the claims; then scores by teacher, routing, costs. None without recorded runs."""
    runs = bert.recorded_runs()
    if not runs:
        return []
    groups = bert.gate_groups(runs, bert.recorded_as_script())
    return [
        "**COMET-BERT**",
        markdown(bert_claims(runs, each_teacher=False)),
        "SST-2, a six-layer encoder (MiniLM) fine-tuned and split into 4 experts per layer. Accuracy on 872 test "
        "sentences: mean ± standard deviation over the seeds of a teacher, then over teachers. `pruned`: one expert "
        f"for all, as wide as one of four. `{bert.SCRIPT}`: gamma and entropy weight of their example.",
        markdown(bert.score_table(groups)),
        "Over all runs. `busiest_expert`: share of the tokens that it gets, mean over layers. `decided_by_word`: share "
        "of tokens that go where most tokens of their word go.",
        markdown(bert.routing_table(groups)),
        "FLOPs and active parameters in % of the teacher's; time and speed of a forward pass beside the teacher's, "
        "median [smallest to largest] over runs.",
        markdown(bert.cost_table(groups)),
    ]


def language_table(results: Sequence[Result]) -> pd.DataFrame:
    """Losses (nats per token), experts per token and training TFLOP of language models, one row per gate.

    A gate that looks ahead is marked: its loss is not that of a model that can generate text.
    """
    table = scores(results, ("final_loss", "test_loss", "experts_per_token"))
    flops: dict[str, list[float]] = {}
    for result in results:
        flops.setdefault(result.config["gate"], []).append(training_curve(result)["flops"].iloc[-1])
    table.insert(3, "training TFLOP", [f"{np.mean(flops[gate]) / 1e12:.2f}" for gate in table.index])
    ahead = {result.config["gate"] for result in results if result.metrics["looks_ahead"]}
    return table.rename(index=lambda gate: f"{gate} (looks ahead)" if gate in ahead else gate)


def evomoe_summary() -> list[str]:
    """Paragraphs: the claims; then language models, small and larger, masked language models, translation."""
    language, masked, translation = (main_evomoe_runs(name) for name in _EVOMOE)
    larger = main_evomoe_runs("evomoe_language", "paper")
    of_language = [language_claims(runs) for runs in (language, larger) if runs]
    shown = [table[~table["paper claims"].str.match("(?:dts|evomoe): less time")] for table in of_language]
    claims = [*shown, masked_claims(masked), translation_claims(translation)]  # notebook 10 has all rows
    (signature,) = {result.metrics["bleu_signature"] for result in translation}
    at_scale = []
    if larger:
        at_scale = [
            "Language models on a GPU (profile `paper`): byte pairs of Python code, 8 layers of 512, 16 experts in "
            "every second layer, 1,500 steps of 16,384 tokens. `final_loss`: validation, nats per byte pair.",
            markdown(language_table(larger)),
        ]
    return [
        markdown(pd.concat(claims)),
        "Language models: characters of tiny Shakespeare, 4 layers of 64, 16 experts in every second layer, 1,500 "
        "steps of 1,024 tokens. `final_loss`: validation, nats per character.",
        markdown(language_table(language)),
        *at_scale,
        "Masked language models: SST-2 from scratch, 4 layers of 128, 16 experts, pre-trained on its own sentences "
        f"(800 steps of 512), then fine-tuned. Always the same answer: {masked[0].metrics['constant_accuracy']:.3f}.",
        markdown(scores(masked, ("test_accuracy", "masked_accuracy", "experts_per_token"))),
        "Translation: Multi30k English to German, 3 + 3 layers of 256, 4 experts in each, 800 steps of 512 pairs, beam "
        f"5, sacreBLEU `{signature}`.",
        markdown(scores(translation, ("bleu", "test_loss", "experts_per_token"), digits=2)),
    ]


def main_exit_runs() -> list[list[Result]]:
    """JEI-DNN, profile "standard": one list of seeds for every data set."""
    found, free = find_results("jei_dnn", root=recorded_dir()), ("seed", "data_seed")
    of_data = [
        [result for result in found if same_setting([result], JeiConfig.profile("standard", dataset=name), free)]
        for name in dict.fromkeys(result.config["dataset"] for result in found)
    ]
    return [runs for runs in of_data if runs]


def exit_modes(dataset: str) -> list[Result]:
    """JEI-DNN, profile "standard", however the classifiers are trained."""
    standard = JeiConfig.profile("standard", dataset=dataset)
    return same_setting(find_results("jei_dnn", root=recorded_dir()), standard, ("mode", "seed", "data_seed"))


def exit_control() -> list[Result]:
    """JEI-DNN on moved digits, warmed up as the authors do it."""
    change = next(change for change in ABLATIONS if change.get("warmup_loss") == "sum")
    found = find_results("jei_dnn", root=recorded_dir())
    return same_setting(found, JeiConfig.profile("standard", **change), ("seed", "data_seed"))


def exits_summary() -> list[str]:
    """Paragraphs: the claims per data set; then gains, coverage and set sizes, mean ± standard deviation over seeds."""
    runs = main_exit_runs()
    claims = [claim(results) for results in runs for claim in (accuracy_claims, uncertainty_claims)]
    modes = [joint_claims(exit_modes(dataset)) for dataset in ("moved-digits", "cifar-10")]
    metrics = ("backbone_accuracy", "gain_over_geometric", "gain_over_shared", "coverage", "set_size")
    table = readable(over_seeds([r for results in runs for r in results], metrics, by=("dataset",)))
    return [
        markdown(pd.concat([*claims, control_claims(exit_control()), *modes])),
        "Accuracy of the whole network; accuracy of learned gates minus that of thresholds at the same cost, mean over "
        "the prices; coverage and size of prediction sets at a nominal 95 %.",
        markdown(table.rename_axis("data")),
    ]


def speed_summary() -> list[str]:
    """Paragraphs: what was asked of the fast paths and what one GPU gave. None without a recorded benchmark."""
    curves = {name: recorded_curve(name) for name in SPEED}
    moe = curves["moe"]
    if moe is None:
        return []
    return [
        "**Speed on one GPU**",
        markdown(speed_claims(curves)),
        f"One MoE layer, forward and backward, {moe.about}; operations that are active. `plain`: sort, grouped "
        "product, `index_add`, PyTorch's own backward.",
        markdown(_shown(moe_table(moe.rows)).reset_index()),
    ]


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    digits = {"ms": 2, "TFLOP/s": 0, "of dense": 2, "of ScatterMoE": 2, "peak, MiB": 0}
    text = {name: [f"{value:.{digits[name]}f}" for value in table[name].astype(float)] for name in table}
    return pd.DataFrame(text, index=table.index)


def summary() -> str:
    """Markdown: what each paper claims and what was measured."""
    parts = ["**COMET**", *comet_summary(), *bert_summary(), "**EvoMoE**", *evomoe_summary()]
    return "\n\n".join([*parts, "**JEI-DNN**", *exits_summary(), *speed_summary()])


if __name__ == "__main__":
    print(summary())
