"""Requests and answers of each API, as its clients write and read them. Keys that are not told here are ignored."""

import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, Discriminator, Field, StrictBool, Tag


def without_lone_surrogates(value: Any) -> Any:
    """A text that was cut within a character, as JavaScript does it, is still a text."""
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


def whole(value: Any) -> Any:
    """To JSON 2.0 is a whole number too. `true` and "2", of which pydantic would make one, stay what they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Above 0, or from 0 on. Strict: `true` for a number, or "false" for a switch, is a client's fault, and is told.
Count = Annotated[int, Field(strict=True, ge=1), BeforeValidator(whole)]
CountOrZero = Annotated[int, Field(strict=True, ge=0), BeforeValidator(whole)]
Text = Annotated[str, BeforeValidator(without_lone_surrogates)]
# A sign that is no blank to anyone: Python, Rust and JavaScript, which reads the schema, disagree about these.
NOT_BLANK = r"[^\s\x1c-\x1f\x85\ufeff]"
Query = Annotated[str, Field(pattern=NOT_BLANK), BeforeValidator(without_lone_surrogates)]


class Document(BaseModel):
    text: Text
    title: Text | None = None


Documents = Annotated[list[Text | Document], Field(min_length=1)]


class Scoring(BaseModel):
    """What is the same in all APIs; none of these is needed."""

    model: Text | None = Field(None, description="Any name: the one model served here answers, and says its own.")
    instruction: Query | None = Field(None, description="What relevance means here, in place of the prompt's words.")
    long_documents: Literal["truncate", "max_passage"] = Field(
        "truncate",
        description="A document that does not fit is cut, or scored in overlapping windows, the best of which counts.",
    )


class JinaRequest(Scoring):
    """Jina's and vLLM's."""

    query: Query
    documents: Documents
    top_n: CountOrZero | None = Field(None, description="Only the best so many; all if 0.")
    return_documents: StrictBool | None = None
    max_tokens_per_doc: Count | None = None


class JinaResult(BaseModel):
    index: int
    relevance_score: float = Field(ge=0, le=1)
    document: Document | None = None
    passage: tuple[int, int] | None = Field(None, description="Characters [start, end) of the best window.")


class JinaUsage(BaseModel):
    total_tokens: int
    prompt_tokens: int


class JinaAnswer(BaseModel):
    id: str
    model: str
    usage: JinaUsage
    results: list[JinaResult]


class CohereRequest(Scoring):
    query: Query
    documents: Documents
    top_n: Count | None = None
    max_tokens_per_doc: Count | None = None


class CohereResult(BaseModel):
    index: int
    relevance_score: float = Field(ge=0, le=1)


class CohereAnswer(BaseModel):
    id: str
    results: list[CohereResult]
    meta: dict[str, Any]


class TeiRequest(Scoring):
    """text-embeddings-inference's."""

    query: Query
    texts: list[Text] = Field(min_length=1)
    raw_scores: StrictBool = Field(False, description="Logits in place of probabilities.")
    return_text: StrictBool = False
    truncate: StrictBool | None = Field(None, description="If false, what does not fit is refused.")


class TeiResult(BaseModel):
    index: int
    score: float
    text: str | None = None


def rerank_form(body: Any) -> str:
    return "TEI" if isinstance(body, dict) and "texts" in body else "JINA"


RerankRequest = Annotated[
    Annotated[JinaRequest, Tag("JINA")] | Annotated[TeiRequest, Tag("TEI")], Discriminator(rerank_form)
]


class ScoreRequest(Scoring):
    """vLLM's: one query for all documents, or as many as documents."""

    queries: Query | Annotated[list[Query], Field(min_length=1)] = Field(
        validation_alias=AliasChoices("queries", "text_1", "data_1")
    )
    documents: Text | Documents = Field(validation_alias=AliasChoices("documents", "text_2", "data_2", "items"))
    max_tokens_per_doc: Count | None = None


class ScoreResult(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float = Field(ge=0, le=1)


class ScoreUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ScoreAnswer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreResult]
    usage: ScoreUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["querit"] = "querit"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class CohereError(BaseModel):
    message: str


class JinaError(BaseModel):
    detail: str


class TeiError(BaseModel):
    error: str
    error_type: str


class VllmErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class VllmError(BaseModel):
    error: VllmErrorInfo
