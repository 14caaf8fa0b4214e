"""Bodies around the mechanisms: what turns users, items, images and text into tokens, and mixtures into predictions."""

from moe_lab.models.body import ExitBody
from moe_lab.models.cnn import ConvNet
from moe_lab.models.language import Classifier, LanguageModel, TransformerSize, Translator
from moe_lab.models.optim import recommender_adam
from moe_lab.models.recommender import RecommenderOutput, TwoTaskRecommender
from moe_lab.models.t2t_vit import T2TViT, t2t_vit_7, t2t_vit_14
from moe_lab.models.t2t_weights import load_official
from moe_lab.models.vision import MultiDigitClassifier
from moe_lab.models.vit import VisionTransformer

__all__ = [
    "Classifier",
    "ConvNet",
    "ExitBody",
    "LanguageModel",
    "MultiDigitClassifier",
    "RecommenderOutput",
    "T2TViT",
    "TransformerSize",
    "Translator",
    "TwoTaskRecommender",
    "VisionTransformer",
    "load_official",
    "recommender_adam",
    "t2t_vit_7",
    "t2t_vit_14",
]
