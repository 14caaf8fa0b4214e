"""Classifier and span finder."""

import pytest
import torch

from moe_lab.bert import SentenceClassifier, SpanFinder, become_mixture, prediction_loss, tokenised, trace
from moe_lab.gates import HashGate


def test_the_mean_is_over_real_tokens(encoder, batch):
    model = SentenceClassifier(encoder, 3, pool="mean").eval()
    last = trace(encoder, batch["tokens"], batch["seen"]).hidden[-1]
    wanted = torch.stack([states[seen].mean(0) for states, seen in zip(last, batch["seen"], strict=True)])
    torch.testing.assert_close(model(batch["tokens"], batch["seen"]).logits, model.head(wanted))


def test_cls_goes_through_the_pooler(encoder, batch):
    model = SentenceClassifier(encoder, 2).eval()
    wanted = encoder(input_ids=batch["tokens"], attention_mask=batch["seen"].long()).pooler_output
    torch.testing.assert_close(model(batch["tokens"], batch["seen"]).logits, model.head(wanted))


def test_padding_changes_no_prediction(teacher, batch):
    longest = int(batch["seen"].sum(1).max())
    short = teacher(batch["tokens"][:, :longest], batch["seen"][:, :longest]).logits
    torch.testing.assert_close(short, teacher(batch["tokens"], batch["seen"]).logits)
    alone = int(batch["seen"][1].sum())
    one = teacher(batch["tokens"][1:2, :alone], batch["seen"][1:2, :alone]).logits
    torch.testing.assert_close(one, short[1:2], rtol=1e-4, atol=1e-6)


def test_heads_start_from_their_generator(encoder):
    heads = [SentenceClassifier(encoder, 2, generator=torch.Generator().manual_seed(s)).head.weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_pooler_that_is_not_there_is_named(encoder):
    encoder.pooler = None
    with pytest.raises(ValueError, match="has no pooler: use pool='mean'"):
        SentenceClassifier(encoder, 2)
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        SentenceClassifier(encoder, 2, pool="men")


def test_answers_lie_in_the_text_and_become_a_mixture_too(encoder, tokenizer, importance):
    arrays, _ = tokenised(tokenizer, ["is it good ?", "what ?"], ["the film is good .", "our soup"], length=14)
    model = SpanFinder(encoder, torch.Generator().manual_seed(0)).eval()
    inputs = (arrays["tokens"], arrays["seen"], arrays["segments"])
    found = model(*inputs)
    assert found.logits.shape == (2, 2, 14)
    probability = found.logits.softmax(-1)
    assert (probability.transpose(1, 2)[~arrays["seen"]] == 0).all()
    student = become_mixture(model, importance, lambda index: HashGate(200, 4, seed=index))
    loss = prediction_loss(student(*inputs).logits, found.logits)
    assert torch.isfinite(loss) and loss > 0
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
