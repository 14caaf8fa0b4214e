"""The README's table of what was measured, computed from the recorded Results; a test keeps the two equal.

python -m moe_lab.experiments.summary
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lab.experiments import comet_bert_tables as bert
from moe_lab.experiments.claims import recommender_claims, tuning_claims
from moe_lab.experiments.comet_bert_claims import bert_claims
from moe_lab.experiments.comet_tuning import pools
from moe_lab.experiments.compare import over_seeds, scores
from moe_lab.experiments.compare import readable as readable_scores
from moe_lab.experiments.evomoe_claims import language_claims, masked_claims, same_setting, translation_claims
from moe_lab.experiments.evomoe_language import LanguageConfig, training_curve
from moe_lab.experiments.evomoe_masked import MaskedConfig
from moe_lab.experiments.evomoe_translation import TranslationConfig
from moe_lab.experiments.jei_claims import accuracy_claims, control_claims, joint_claims, uncertainty_claims
from moe_lab.experiments.jei_config import ABLATIONS, JeiConfig
from moe_lab.experiments.mixture_config import GATES, MixtureConfig
from moe_lab.experiments.recorded_studies import (
    control_of,
    cpu_study,
    gpu_study,
    machine,
    side_by_side,
    vision_study,
)
from moe_lab.experiments.speed_claims import CLAIMS as SPEED
from moe_lab.experiments.speed_claims import moe_table, recorded_curve, speed_claims
from moe_lab.experiments.unlearned_search import compare, readable
from moe_lab.experiments.vision_claims import vision_claims
from moe_lab.experiments.vision_config import BASELINES
from moe_lab.paths import recorded_dir
from moe_lab.results import Result, find_results
from moe_lab.search_spaces import describe, search_space
from moe_lab.tuning import Pool, top_share

_RECOMMENDER = ("test_loss", "test_auc", "test_mse", "experts_per_example", "used_experts")
_FLOOR = {"test_loss": "constant_loss", "test_auc": "popularity_auc", "test_mse": "constant_mse"}
_VISION = ("test_loss", "test_accuracy", "experts_per_example", "used_experts")


def main_recommender_runs(n_experts: int = 8) -> list[Result]:
    """MovieLens-100k, task weights (0.9, 0.1), default gamma and entropy weight: one run per gate and seed.

    ``n_experts=1``: the baseline without anything to route.
    """
    same = {"dataset": "ml-100k", "watch_weight": 0.9, "gamma": 1.0, "entropy_weight": 0.1}
    return find_results("comet_recommender", root=recorded_dir(), n_experts=n_experts, **same)


def main_vision_runs() -> list[Result]:
    """MultiMNIST, raw pixels, default gamma and entropy weight: one run per gate or baseline and seed."""
    same = {"dataset": "multimnist", "gamma": 10.0, "entropy_weight": 0.1, "center_pixels": False}
    return find_results("comet_vision", root=recorded_dir(), **same)


def tuning_study() -> Result:
    """The random search on MovieLens-100k of a 2-core CPU."""
    study = cpu_study()
    assert study is not None
    return study


def unlearned_control() -> Result:
    """The control of `tuning_study`: "+" with nothing learned."""
    control = control_of(tuning_study())
    assert control is not None
    return control


def _study_tables() -> list[str]:
    """Paragraphs on the random searches; that of a GPU beside that of a CPU where both are there."""
    small, large, images = tuning_study(), gpu_study(), vision_study()
    said = "8 epochs each, best 5 % by validation loss, mean and standard error of their test loss."
    if large is None:
        parts = [
            f"Random search on MovieLens-100k, {small.config['n_trials']} trials per gate, {said}",
            _markdown(tuning_table("ml-100k", pools(small))),
        ]
    else:
        parts = [
            f"Random search on MovieLens-100k, {said} CPU: {machine(small)}. GPU: {machine(large)}.",
            _markdown(side_by_side({"CPU": small, "GPU": large}, "ml-100k")),
        ]
    if images is not None:
        epochs = images.config["changes"]["epochs"]
        parts += [
            f"Random search on MultiMNIST, 100,000 / 20,000 / 20,000 images, 16 CNN experts, {epochs} epochs each, "
            f"best 5 % by validation loss, mean and standard error of their test loss and accuracy. {machine(images)}.",
            _markdown(side_by_side({"GPU": images}, "multimnist")),
        ]
    controls = {"CPU" if large is not None else "": (small, unlearned_control())}
    if large is not None and (control := control_of(large)) is not None:
        controls["GPU"] = (large, control)
    question = 'Is it the search? The same trials of "+" once more, the permutation never learned'
    parts.append(f"{question}: test loss, mean over trials.")
    for label, pair in controls.items():
        parts += [f"{label}:"] * bool(label) + [_markdown(readable(compare(*pair)))]
    return parts


_EVOMOE: dict[str, type[MixtureConfig]] = {
    "evomoe_language": LanguageConfig,
    "evomoe_masked": MaskedConfig,
    "evomoe_translation": TranslationConfig,
}


def main_evomoe_runs(experiment: str) -> list[Result]:
    """Profile "standard" of an EvoMoE experiment: one run per gate and seed, gates in the order of `GATES`.

    Args:
        experiment: "evomoe_language", "evomoe_masked" or "evomoe_translation".
    """
    standard = _EVOMOE[experiment].profile("standard")
    found = same_setting(find_results(experiment, root=recorded_dir()), standard)
    return sorted(found, key=lambda result: (GATES.index(result.config["gate"]), result.seed))


def tuning_table(dataset: str, of_gate: dict[str, Pool]) -> pd.DataFrame:
    """The paper's table entry per gate: the best 5 % of trials, beside the size of the space they were drawn from."""
    rows = {}
    for gate, pool in of_gate.items():
        top = top_share(pool)
        rows[gate] = {
            "search space": describe(search_space(dataset, gate)),
            "trials": len(pool.test),
            f"test loss, best {top.n}": f"{top.mean:.4f}" + (f" ± {top.standard_error:.4f}" if top.n > 1 else ""),
        }
    return pd.DataFrame(rows).T.rename_axis("gate")


def _markdown(table: pd.DataFrame) -> str:
    header = [name for name in (table.index.name, *table.columns) if name]
    rows = table.reset_index().values if table.index.name else table.values
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _order(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda result: (result.config["gate"] not in BASELINES, result.config["gate"]))


def comet_summary() -> list[str]:
    """Paragraphs: the claims; then recommender, vision, tuning, mean ± standard deviation over seeds (or trials)."""
    recommender, vision = main_recommender_runs(), main_vision_runs()
    known = recommender[0].metrics
    floor = {name: known[kind] for name, kind in _FLOOR.items()}
    data = "ml-100k"
    claims = [recommender_claims(recommender), vision_claims(vision), tuning_claims(pools(tuning_study()), data)]
    for dataset, study in ((data, gpu_study()), ("multimnist", vision_study())):
        if study is not None:
            claims.append(tuning_claims(pools(study), f"{dataset}, {study.environment['device']}"))
    return [
        _markdown(pd.concat(claims)),
        "MovieLens-100k, two tasks, 8 experts of 64, k = 2, 12 epochs. Without a network: the constant's loss and "
        "MSE, the AUC of popularity.",
        _markdown(
            scores(_order(recommender), _RECOMMENDER, one_expert=main_recommender_runs(n_experts=1), floor=floor)
        ),
        "MultiMNIST, 100,000 / 20,000 / 20,000 images, 16 CNN experts, k = 4, at most 15 epochs. `one_expert` and "
        "`expert_per_task`: no routing, networks of an expert's size.",
        _markdown(scores(_order(vision), _VISION)),
        *_study_tables(),
    ]


def bert_summary() -> list[str]:
    """Paragraphs: the claims; then scores by teacher, routing, costs. None without recorded runs."""
    runs = bert.recorded_runs()
    if not runs:
        return []
    groups = bert.gate_groups(runs, bert.recorded_as_script())
    return [
        "**COMET-BERT**",
        _markdown(bert_claims(runs, each_teacher=False)),
        "SST-2, a six-layer encoder (MiniLM) fine-tuned and split into 4 experts per layer. Accuracy on 872 test "
        "sentences: mean ± standard deviation over the seeds of a teacher, then over teachers. `pruned`: one expert "
        f"for all, as wide as one of four. `{bert.SCRIPT}`: gamma and entropy weight of their example.",
        _markdown(bert.score_table(groups)),
        "Over all runs. `busiest_expert`: share of the tokens that it gets, mean over layers. `decided_by_word`: share "
        "of tokens that go where most tokens of their word go.",
        _markdown(bert.routing_table(groups)),
        "FLOPs and active parameters in % of the teacher's; time and speed of a forward pass beside the teacher's, "
        "median [smallest to largest] over runs.",
        _markdown(bert.cost_table(groups)),
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
    """Paragraphs: the claims; then language models, masked language models, translation."""
    language, masked, translation = (main_evomoe_runs(name) for name in _EVOMOE)
    of_language = language_claims(language)
    shown = ~of_language["paper claims"].str.match("dts|evomoe: less time")  # notebook 10 has all rows
    claims = [of_language[shown], masked_claims(masked), translation_claims(translation)]
    (signature,) = {result.metrics["bleu_signature"] for result in translation}
    return [
        _markdown(pd.concat(claims)),
        "Language models: characters of tiny Shakespeare, 4 layers of 64, 16 experts in every second layer, 1,500 "
        "steps of 1,024 tokens. `final_loss`: validation, nats per character.",
        _markdown(language_table(language)),
        "Masked language models: SST-2 from scratch, 4 layers of 128, 16 experts, pre-trained on its own sentences "
        f"(800 steps of 512), then fine-tuned. Always the same answer: {masked[0].metrics['constant_accuracy']:.3f}.",
        _markdown(scores(masked, ("test_accuracy", "masked_accuracy", "experts_per_token"))),
        "Translation: Multi30k English to German, 3 + 3 layers of 256, 4 experts in each, 800 steps of 512 pairs, beam "
        f"5, sacreBLEU `{signature}`.",
        _markdown(scores(translation, ("bleu", "test_loss", "experts_per_token"), digits=2)),
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
    table = readable_scores(over_seeds([r for results in runs for r in results], metrics, by=("dataset",)))
    return [
        _markdown(pd.concat([*claims, control_claims(exit_control()), *modes])),
        "Accuracy of the whole network; accuracy of learned gates minus that of thresholds at the same cost, mean over "
        "the prices; coverage and size of prediction sets at a nominal 95 %.",
        _markdown(table.rename_axis("data")),
    ]


def speed_summary() -> list[str]:
    """Paragraphs: what was asked of the fast paths and what one GPU gave. None without a recorded benchmark."""
    curves = {name: recorded_curve(name) for name in SPEED}
    moe = curves["moe"]
    if moe is None:
        return []
    return [
        "**Speed on one GPU**",
        _markdown(speed_claims(curves)),
        f"One MoE layer, forward and backward, {moe.about}; operations that are active. `plain`: sort, grouped "
        "product, `index_add`, PyTorch's own backward.",
        _markdown(_shown(moe_table(moe.rows)).reset_index()),
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
