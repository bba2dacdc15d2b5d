"""What one request may ask for, and the message for one that asks for more."""

from dataclasses import dataclass

from querit.decoding import clean


class RefusedError(ValueError):
    """What a visitor asked for is not done. The message, shown to them, says why and what to do instead."""


@dataclass(frozen=True)
class Limits:
    """Sizes in characters unless the name says otherwise. Made for two cores and the smallest model of the family."""

    query: int = 2_000
    instruction: int = 1_000
    documents: int = 200
    text: int = 2_000_000  # all documents together
    file_bytes: int = 5_000_000
    seconds: float = 30  # of computing, for one ranking
    sentences: int = 60  # of an explanation
    link: int = 16_000
    unpacked_bytes: int = 20_000_000  # of an archive, or of several files together
    judged_documents: int = 5_000
    judged_queries: int = 50  # of larger sets so many are drawn
    candidates: int = 30  # reranked for a judged query
    evaluation_seconds: float = 120


def check_query(query: object, limits: Limits) -> str:
    if not isinstance(query, str):
        raise RefusedError("The query must be text.")
    if not query.strip():
        raise RefusedError("Type a query: what are you looking for?")
    if len(query) > limits.query:
        raise RefusedError(f"The query has {len(query):,} characters; at most {limits.query:,} are taken.")
    return clean(query)


def check_documents(documents: object, limits: Limits) -> list[str]:
    if not isinstance(documents, list | tuple) or not all(isinstance(document, str) for document in documents):
        raise RefusedError("The documents must be a list of texts.")
    if not documents:
        raise RefusedError("Give documents to rank: paste some, or drop a file.")
    if len(documents) > limits.documents:
        raise RefusedError(f"There are {len(documents):,} documents; at most {limits.documents:,} are ranked at once.")
    if (size := sum(map(len, documents))) > limits.text:
        raise RefusedError(f"The documents have {size:,} characters together; at most {limits.text:,} are taken.")
    return [clean(document) for document in documents]


def check_instruction(instruction: object, limits: Limits) -> str | None:
    """-> None where it is left out: the model's own prompt."""
    if instruction is None or (isinstance(instruction, str) and not instruction.strip()):
        return None
    if not isinstance(instruction, str):
        raise RefusedError("The instruction must be text.")
    if len(instruction) > limits.instruction:
        raise RefusedError(
            f"The instruction has {len(instruction):,} characters; at most {limits.instruction:,} are taken."
        )
    return clean(instruction)
