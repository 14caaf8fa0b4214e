"""Texts become tensors."""

import pytest
import torch

from moe_lab.bert import tokenised
from moe_lab.bert.texts import trimmed


def test_ids_are_those_of_the_tokenizer_and_padding_is_marked(tokenizer):
    arrays, n_cut = tokenised(tokenizer, ["the film", "our quiet room is good"], length=8)
    assert n_cut == 0
    assert arrays["tokens"][0, :4].tolist() == tokenizer("the film")["input_ids"]
    assert arrays["seen"].sum(1).tolist() == [4, 7] and arrays["seen"].dtype == torch.bool
    assert arrays["tokens"][~arrays["seen"]].unique().tolist() == [tokenizer.pad_token_id]
    assert arrays["segments"].sum() == 0


def test_rows_are_what_the_tokenizer_would_have_padded_itself(tokenizer):
    first = ["the film", "", "our quiet room is good and the film is bad and warm", "is it good ?"]
    second = ["is good", "why ?", "the soup", ""]
    for pairs in ((), (second,)):
        arrays, _ = tokenised(tokenizer, first, *pairs, length=9)
        wanted = tokenizer(first, *pairs, truncation=True, max_length=9, padding="max_length")
        for name, key in (("tokens", "input_ids"), ("segments", "token_type_ids"), ("seen", "attention_mask")):
            assert arrays[name].tolist() == wanted[key]


def test_pairs_have_two_segments(tokenizer):
    arrays, _ = tokenised(tokenizer, ["the film", "our room"], ["is good", "is quiet and warm"], length=12)
    assert arrays["segments"].sum(1).tolist() == [3, arrays["segments"][1].sum()]
    assert arrays["tokens"][0, :7].tolist() == tokenizer("the film", "is good")["input_ids"]


def test_long_texts_are_cut_and_counted_and_keep_their_end_token(tokenizer):
    arrays, n_cut = tokenised(tokenizer, ["the film", "the film is good and the film is bad"], length=6)
    assert n_cut == 1
    assert arrays["tokens"][1, 0] == tokenizer.cls_token_id and arrays["tokens"][1, -1] == tokenizer.sep_token_id


def test_a_text_of_exactly_the_length_is_not_cut(tokenizer):
    assert tokenised(tokenizer, ["the film is good"], length=6).n_cut == 0
    assert tokenised(tokenizer, ["the film is good"], length=5).n_cut == 1


def test_long_texts_can_be_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"1 of 2 texts have more than 6 tokens, the first is number 1: 'the film is"):
        tokenised(tokenizer, ["the", "the film is good and bad"], length=6, limit=40, too_long="error")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 41, "limit": 40}, "length=41 is above the encoder's limit of 40 tokens"),
        ({"length": 8, "too_long": "cutt"}, "did you mean 'cut'"),
    ],
)
def test_impossible_requests_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenised(tokenizer, ["the"], **options)


def test_no_texts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no texts"):
        tokenised(tokenizer, [], length=8)


def test_columns_of_padding_are_dropped(batch):
    longest = int(batch["seen"].sum(1).max())
    short = trimmed(batch)
    assert short["tokens"].shape == (6, longest) and short["label"].shape == (6,)
    assert short["seen"].sum() == batch["seen"].sum()
