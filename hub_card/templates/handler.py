"""What Hugging Face's Inference Endpoints run of a release (a custom handler): the pipeline."""

from typing import Any

from transformers import pipeline


class EndpointHandler:
    def __init__(self, path: str = ""):
        self.ranker = pipeline("text-ranking", model=path, trust_remote_code=True)  # type: ignore[call-overload]

    def __call__(self, data: dict[str, Any]) -> list:
        """`{"inputs": {"query", "texts"}, "parameters": {"top_k": 3, ...}}` -> results, best first."""
        return self.ranker(data["inputs"], **(data.get("parameters") or {}))
