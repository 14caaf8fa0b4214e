"""Texts, encoders and saved weights of the COMET-BERT experiment."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.atomic import atomic_file
from moe_lab.bert import SentenceClassifier, load_encoder, load_minilm, longest_sequence, tiny_encoder, tokenised
from moe_lab.datasets.glue import TextTask, load_task
from moe_lab.experiments.comet_bert_config import TeacherConfig
from moe_lab.results import Result
from moe_lab.results.plain import dumps, loads, to_plain


class Texts(NamedTuple):
    """A task as its teacher reads it.

    Attributes:
        task: the texts.
        tokenizer: the encoder's.
        arrays: split -> tokens, segments, seen (N, length) and label (N,).
        n_cut: split -> texts that were too long.
        counts: (vocabulary of the encoder,) how often each id occurs in train, padding left out.
    """

    task: TextTask
    tokenizer: Any
    arrays: dict[str, dict[str, Tensor]]
    n_cut: dict[str, int]
    counts: Tensor


def load_texts(config: TeacherConfig) -> Texts:
    """The task of a config, tokenised; steps of one process share it.

    Raises:
        ValueError: ``length`` is above the encoder's limit; as `load_task` and `load_encoder`.
        DatasetNotFound, FileNotFoundError: the texts, or the encoder, are not here.
    """
    fields = ("task", "data_seed", "data_options", "model", "tiny", "length")
    return _load_texts(dumps(to_plain({name: getattr(config, name) for name in fields})))


def _load_encoder(model: str, tiny: Mapping[str, Any], task: TextTask) -> tuple[nn.Module, Any]:
    if model == "tiny":
        return tiny_encoder(task.train.first, **tiny)
    return load_minilm() if model == "minilm" else load_encoder(model)


@lru_cache(maxsize=1)
def _load_texts(key: str) -> Texts:
    about = loads(key)
    task = load_task(about["task"], about["data_seed"], **about["data_options"])
    encoder, tokenizer = _load_encoder(about["model"], about["tiny"], task)
    arrays, n_cut = {}, {}
    for name in ("train", "valid", "test"):
        rows = getattr(task, name)
        columns, n_cut[name] = tokenised(
            tokenizer, rows.first, rows.second, length=about["length"], limit=longest_sequence(encoder)
        )
        arrays[name] = {**columns, "label": torch.as_tensor(rows.label)}
    n_ids = encoder.get_input_embeddings().num_embeddings
    counts = torch.bincount(arrays["train"]["tokens"][arrays["train"]["seen"]], minlength=n_ids)
    return Texts(task, tokenizer, arrays, n_cut, counts)


def new_classifier(config: TeacherConfig, texts: Texts) -> SentenceClassifier:
    """The pretrained encoder with a new head, not yet fine-tuned, in eval mode."""
    encoder, _ = _load_encoder(config.model, config.tiny, texts.task)
    generator = torch.Generator().manual_seed(config.teacher_seed)
    return SentenceClassifier(encoder, texts.task.n_classes, config.pool, config.dropout, generator).eval()


def weights_path(result: Result) -> Path:
    """Where a step's weights are: beside its Result."""
    return result.path.with_suffix(".safetensors")


def save_weights(model: nn.Module, result: Result) -> None:
    """Write the weights, all or nothing."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_file(weights_path(result)) as file:
        file.write(save(tensors))


def load_weights(model: nn.Module, result: Result) -> None:
    """Fill ``model`` with a step's weights.

    Raises:
        FileNotFoundError: the Result is here, its weights are not (recorded Results come without).
    """
    from safetensors.torch import load_file

    path = weights_path(result)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is not beside its Result in {path.parent}: weights are not kept in the repository. Run the "
            "step again with recompute=True."
        )
    model.load_state_dict(load_file(path))
