"""A tiny teacher on which nothing was downloaded and nothing was trained."""

import copy

import pytest
import torch

TEXTS = [
    "the film is very good .",
    "this soup was not bad but the bread is awful .",
    "our room is quiet .",
    "the phone is never weak although the case was dull !",
    "a good film",
    "the coffee is great , really great .",
]
PAIRS = ["is it good ?", "what is awful ?", "is it quiet ?", "why ?", "is it ?", "how is the coffee ?"]


@pytest.fixture(scope="session")
def _tiny():
    from moe_lab.bert import tiny_encoder

    encoder, tokenizer = tiny_encoder(TEXTS, seed=3, layers=2, width=12, heads=2, hidden=24, length=40)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # biases start at 0 and norms at 1: then nobody would notice one that is forgotten
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder, tokenizer


@pytest.fixture
def encoder(_tiny):
    return copy.deepcopy(_tiny[0])


@pytest.fixture(scope="session")
def tokenizer(_tiny):
    return _tiny[1]


@pytest.fixture(scope="session")
def batch(_tiny):
    """Six sentences of different lengths, with labels."""
    from moe_lab.bert import tokenised

    arrays, n_cut = tokenised(_tiny[1], TEXTS, length=16)
    assert n_cut == 0
    return {**arrays, "label": torch.tensor([1, 0, 1, 1, 1, 0])}


@pytest.fixture
def teacher(encoder):
    from moe_lab.bert import SentenceClassifier

    return SentenceClassifier(encoder, 2, generator=torch.Generator().manual_seed(5)).eval()


@pytest.fixture
def importance():
    generator = torch.Generator().manual_seed(6)
    return [torch.rand(24, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def answer(batch):
    """Model -> `Answer` on the six sentences."""
    return lambda model: model(batch["tokens"], batch["seen"], batch["segments"])
