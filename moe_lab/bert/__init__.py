"""COMET-BERT: a pretrained transformer becomes a mixture of experts (COMET, KDD 2023, section on BERT).

Needs the extra ``bert`` (``pip install -e ".[bert]"``); `transformers` is imported when an encoder is loaded, not here.
"""

from moe_lab.bert.distil import layer_loss, prediction_loss
from moe_lab.bert.encoder import check_layout, check_tokenizer, load_encoder, load_minilm, longest_sequence
from moe_lab.bert.experts import BlockExperts
from moe_lab.bert.heads import SentenceClassifier, SpanFinder
from moe_lab.bert.importance import neuron_importance
from moe_lab.bert.mixture import MixtureBlock, become_mixture, split_neurons, switched_off
from moe_lab.bert.texts import tokenised
from moe_lab.bert.tiny import tiny_encoder
from moe_lab.bert.trace import Trace, trace

__all__ = [
    "BlockExperts",
    "MixtureBlock",
    "SentenceClassifier",
    "SpanFinder",
    "Trace",
    "become_mixture",
    "check_layout",
    "check_tokenizer",
    "layer_loss",
    "load_encoder",
    "load_minilm",
    "longest_sequence",
    "neuron_importance",
    "prediction_loss",
    "split_neurons",
    "switched_off",
    "tiny_encoder",
    "tokenised",
    "trace",
]
