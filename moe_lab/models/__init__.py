"""Bodies around the mechanisms: what turns users, items, images and text into tokens, and mixtures into predictions."""

from moe_lab.models.language import Classifier, LanguageModel, TransformerSize, Translator
from moe_lab.models.optim import recommender_adam
from moe_lab.models.recommender import RecommenderOutput, TwoTaskRecommender
from moe_lab.models.vision import MultiDigitClassifier

__all__ = [
    "Classifier",
    "LanguageModel",
    "MultiDigitClassifier",
    "RecommenderOutput",
    "TransformerSize",
    "Translator",
    "TwoTaskRecommender",
    "recommender_adam",
]
