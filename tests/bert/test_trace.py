"""Layer by layer gives what transformers' own forward gives."""

import pytest
import torch

from moe_lab.bert import trace


def compare(encoder, tokens, seen, segments):
    with torch.no_grad():
        found = trace(encoder, tokens, seen, segments)
        given = {} if segments is None else {"token_type_ids": segments}
        wanted = encoder(input_ids=tokens, attention_mask=seen.long(), output_hidden_states=True, **given)
    assert found.routings == [] and len(found.hidden) == len(wanted.hidden_states)
    for ours, theirs in zip(found.hidden, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-5, atol=1e-6)
    assert found.hidden[0].std() > 0.5 and (found.hidden[2] - found.hidden[1]).std() > 0.1  # something happens


def test_hidden_states_are_those_of_transformers(encoder, batch):
    compare(encoder, batch["tokens"], batch["seen"], None)


def test_two_segments_too(encoder, tokenizer):
    read = tokenizer(["the film", "our room is"], ["is it good", "why"], padding=True, return_tensors="pt")
    segments = read["token_type_ids"]
    assert segments.sum() > 0
    compare(encoder, read["input_ids"], read["attention_mask"].bool(), segments)
    with torch.no_grad():
        one = trace(encoder, read["input_ids"], read["attention_mask"].bool()).hidden[0]
        two = trace(encoder, read["input_ids"], read["attention_mask"].bool(), segments).hidden[0]
    assert not torch.allclose(one, two)


def test_roberta_too_though_it_knows_no_segments():
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(
        vocab_size=30, max_position_embeddings=20, pad_token_id=1, type_vocab_size=1, initializer_range=0.3, **sizes
    )
    model = RobertaModel(config).eval()
    tokens = torch.tensor([[0, 7, 8, 9, 2], [0, 12, 2, 1, 1]])
    seen = tokens != 1
    compare(model, tokens, seen, None)
    with torch.no_grad():
        a = trace(model, tokens, seen, torch.ones_like(tokens)).hidden[-1]
        b = trace(model, tokens, seen).hidden[-1]
    assert torch.equal(a, b)


def test_padding_has_no_influence(encoder, batch):
    tokens, seen = batch["tokens"].clone(), batch["seen"]
    before = trace(encoder, tokens, seen).hidden[-1]
    tokens[~seen] = 7
    torch.testing.assert_close(trace(encoder, tokens, seen).hidden[-1][seen], before[seen])


def test_an_eager_encoder_is_not_given_a_mask_it_would_add(encoder, batch):
    wanted = trace(encoder, batch["tokens"], batch["seen"]).hidden[-1]
    encoder.set_attn_implementation("eager")
    torch.testing.assert_close(trace(encoder, batch["tokens"], batch["seen"]).hidden[-1], wanted)


def test_sequences_over_the_limit_are_refused(encoder):
    tokens = torch.full((1, 41), 7)
    with pytest.raises(ValueError, match="41 tokens, but the encoder has 40 positions"):
        trace(encoder, tokens, tokens > 0)
