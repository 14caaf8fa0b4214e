"""Bodies around the mechanisms: what turns users, items and images into tokens, and mixtures into predictions."""

from moe_lab.models.optim import recommender_adam
from moe_lab.models.recommender import RecommenderOutput, TwoTaskRecommender
from moe_lab.models.vision import MultiDigitClassifier

__all__ = ["MultiDigitClassifier", "RecommenderOutput", "TwoTaskRecommender", "recommender_adam"]
