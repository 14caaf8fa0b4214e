"""The views of notebook 10 show what the record says or the model writes, follow their controls, and are quick."""

import dataclasses
import io

import pytest
import torch
from matplotlib.figure import Figure
from slider_time import IN_TIME, plain_figures

from moe_lab.experiments.evomoe_language import LanguageConfig, build_model, load_text
from moe_lab.results import Result
from moe_lab.runtime import seed_everything
from moe_lab.widgets.language import CurvePicker, LiveText, Samples, choices


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def result(gate, seed=0, sample="some text", ahead=False):
    config = LanguageConfig(gate=gate, seed=seed, steps=20, evaluate_every=10)
    rows = [{"step": step, "valid_loss": 30.0 / step, "train_experts": 1.0, "seconds": 2.0} for step in (10, 20)]
    metrics = {
        "n_tokens": 45,
        "length": 48,
        "prompt": "a dog",
        "sample": sample,
        "test_loss": 1.5,
        "looks_ahead": ahead,
    }
    return Result(
        "evomoe_language", dataclasses.asdict(config), None, seed=seed, metrics=metrics, curves={"epochs": rows}
    )


RESULTS = [result("switch"), result("dts"), result("switch", 1)]


def test_the_picker_draws_the_chosen_gates_on_the_chosen_axis():
    picker = CurvePicker(RESULTS)
    assert picker.gates == ("switch", "dts")
    (ax,) = picker.view(("dts",), "seconds").axes
    assert len(ax.lines) == 1 and ax.lines[0].get_xdata().tolist() == [2.0, 4.0]
    (ax,) = picker.view(("dts", "switch", "unknown"), "step").axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["switch", "dts"]


def test_nothing_chosen_is_said():
    (ax,) = CurvePicker(RESULTS).view(()).axes
    assert ax.get_title() == "choose a gate" or ax.get_title(loc="left") == "choose a gate"


def test_samples_show_prompt_text_and_loss():
    samples = Samples([*RESULTS, result("expert_choice", sample="first\n\nthird $x_1$", ahead=True)])
    shown = texts(samples.view("expert_choice", 0))
    assert shown[0] == "expert_choice, seed 0: test loss 1.500 nats per token; it looks ahead when trained"
    assert shown[1:] == ["a dog", "first", "", "third $x_1$"]
    assert (samples.gates, samples.seeds) == (("switch", "dts", "expert_choice"), (0, 1))
    assert texts(samples.view("dts", 1)) == ["no run of dts with seed 1"]


def test_long_samples_are_cut_into_lines_and_then_off():
    samples = Samples([result("dts", sample="abcdefghij" * 4)], columns=10, n_characters=25)
    assert texts(samples.view("dts"))[2:] == ["abcdefghij", "abcdefghij", "abcde"]


def test_choices_keep_what_exists_and_never_choose_nothing():
    assert choices(["a", "b"], ["b", "c"]) == {"options": ("a", "b"), "value": ("b",)}
    assert choices(["a", "b"], ["c"])["value"] == ("a",)


@pytest.fixture(scope="module")
def data():
    return load_text(LanguageConfig(data_options={"n_characters": 5_000, "length": 24}))


def live(data, gate="switch", **options):
    seed_everything(0)
    model = build_model(LanguageConfig(gate=gate, n_experts=4, width=16), data).eval()
    return LiveText(model, data.info["tokenizer"], data.test["tokens"][0, :8], **options)


def test_a_character_has_the_expert_that_the_upmost_mixture_gave_it(data):
    view = live(data, n_new=10)
    text, experts = view.write(temperature=1.0, seed=3)
    assert len(text) == len(experts) == 18
    assert experts[:7] == [None] * 7 and experts[-1] is None  # the prompt's last character is the first that is read
    tokens = torch.tensor(data.info["tokenizer"].encode(text))
    _, routings = view.model(tokens[None, :17])
    assert experts[7:17] == routings[-1].weights.argmax(-1)[7:].tolist()


def test_temperature_and_seed_change_the_text_and_0_is_greedy(data):
    view = live(data, n_new=20)
    assert view.write(1.0, 0)[0] == view.write(1.0, 0)[0]
    assert view.write(1.0, 0)[0] != view.write(1.0, 1)[0]
    assert view.write(0.0, 0)[0] == view.write(0.0, 1)[0]
    assert png(view.view(1.0, 0)) != png(view.view(0.2, 0))


def test_the_figure_shows_every_character_in_its_place(data):
    view = live(data, n_new=22, columns=10)
    text, experts = view.write(0.8, 0)
    figure = view.view(0.8, 0)
    shown = texts(figure)
    assert "".join(shown[:6]) == text  # three lines, each the prompt's part and the rest
    assert "temperature 0.8, seed 0" in shown
    assert {str(expert) for expert in experts if expert is not None} <= set(shown)
    paper = figure.axes[0].images[0].get_array()
    assert paper.shape == (3, 10, 3)
    coloured = (paper.reshape(-1, 3) < 1).any(1)
    assert coloured.tolist() == [expert is not None for expert in experts]


def test_a_model_without_mixture_writes_without_colours(data):
    view = live(data, gate="dense", n_new=5)
    _, experts = view.write(1.0, 0)
    assert set(experts) == {None}
    assert "expert" not in texts(view.view())


def test_the_listener_is_gone_after_writing(data):
    view = live(data, n_new=3)
    view.write(1.0, 0)
    assert not any(module._forward_hooks for module in view.model.modules())


@pytest.mark.parametrize("name", ["curves", "samples"])
def test_replays_are_quick_enough_for_a_slider(name):
    view = {"curves": lambda: CurvePicker(RESULTS).view(), "samples": lambda: Samples(RESULTS).view("dts")}[name]
    assert plain_figures(view) < IN_TIME
