"""Querit rerankers: what is published beside the weights, importable as a package."""

from .modeling_querit import QueritForSequenceClassification, QueritOutput
from .pipeline_querit import TextRankingPipeline
from .prompting_querit import PromptEncoder
from .scoring_querit import score_pairs

__all__ = ["PromptEncoder", "QueritForSequenceClassification", "QueritOutput", "TextRankingPipeline", "score_pairs"]
