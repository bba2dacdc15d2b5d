"""What a visitor takes away: a link, files, and the lines of Python that give the same result."""

import base64
import csv
import io
import json
import zlib
from dataclasses import dataclass

from space_app.limits import Limits, RefusedError
from space_app.models import Models
from space_app.ranking import Ranking, Request

FRAGMENT = "r="  # of the link, after the #: that part never reaches a server's log
INLINE = 4_000  # characters of documents that are written out in the lines of Python


@dataclass(frozen=True)
class Shared:
    query: str
    documents: list[str]
    instruction: str
    long_documents: str
    model: str


def pack(request: Request, limits: Limits) -> str:
    """The fragment of a link that carries query and documents. Raises RefusedError if it is too long."""
    fields = {"q": request.query, "d": request.documents, "m": request.model}
    if request.instruction:
        fields["i"] = request.instruction
    if request.long_documents != "truncate":
        fields["l"] = request.long_documents
    packed = zlib.compress(json.dumps(fields, ensure_ascii=False).encode(), 9)
    fragment = FRAGMENT + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    if len(fragment) > limits.link:
        raise RefusedError(f"The link would have {len(fragment):,} characters; share the JSON file instead.")
    return fragment


def unpack_link(fragment: object, limits: Limits) -> Shared | None:
    """What a link carries; None if it is not one of ours. Raises RefusedError for a damaged one."""
    if not isinstance(fragment, str) or not fragment.lstrip("#").startswith(FRAGMENT):
        return None
    encoded = fragment.lstrip("#").removeprefix(FRAGMENT)
    try:
        if len(encoded) > limits.link:
            raise ValueError("too long")
        most = 4 * (limits.text + limits.query + limits.instruction)
        reader = zlib.decompressobj()
        data = reader.decompress(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)), most)
        if not reader.eof:
            raise ValueError("cut off, or unpacks to too much")
        fields = json.loads(data)
        shared = Shared(
            fields["q"], fields["d"], fields.get("i", ""), fields.get("l", "truncate"), str(fields.get("m", ""))
        )
        texts = [shared.query, shared.instruction, shared.long_documents, *shared.documents]
        if not isinstance(shared.documents, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("not texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error):
        raise RefusedError("The link is damaged: ask for it again, or type the query anew.") from None
    return shared


def table_rows(ranking: Ranking) -> list[dict]:
    documents = ranking.request.documents
    return [
        {
            "place": result.place,
            "first_stage_place": result.before,
            "index": result.index,
            "score": result.score,
            "probability": result.probability,
            "truncated": result.truncated,
            "passage": list(result.passage) if result.passage else None,
            "document": documents[result.index],
        }
        for result in ranking.results
    ]


def as_json(ranking: Ranking) -> str:
    request = ranking.request
    return json.dumps(
        {
            "model": request.model,
            "query": request.query,
            "instruction": request.instruction,
            "long_documents": request.long_documents,
            "documents": request.documents,
            "results": table_rows(ranking),
        },
        ensure_ascii=False,
        indent=1,
    )


def as_csv(ranking: Ranking) -> str:
    """For a spreadsheet: what it would take for a formula gets an apostrophe in front. The JSON has the exact texts."""
    out = io.StringIO()
    rows = table_rows(ranking)
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        text, passage = row["document"], row["passage"]
        row["document"] = f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
        row["passage"] = f"{passage[0]}:{passage[1]}" if passage else ""
        writer.writerow(row)
    return "\ufeff" + out.getvalue()


def as_python(ranking: Ranking, models: Models) -> str:
    """Lines that give the same ranking; of many or long documents, with the JSON file that the page offers."""
    request = ranking.request
    options = ""
    if request.instruction:
        options += f", instruction={request.instruction!r}"
    if request.long_documents != "truncate":
        options += f", long_documents={request.long_documents!r}"
    lines = ["from transformers import pipeline", ""]
    if sum(map(len, request.documents)) <= INLINE:
        documents = "[\n" + "".join(f"    {document!r},\n" for document in request.documents) + "]"
    else:
        lines.insert(0, "import json")
        documents = 'json.load(open("ranking.json", encoding="utf-8"))["documents"]'
    model = models.python_arguments(request.model)
    lines += [
        f'ranker = pipeline("text-ranking", model={model}, trust_remote_code=True)',
        f"documents = {documents}",
        f"for result in ranker({request.query!r}, documents{options}):",
        '    print(f"{result[\'score\']:+.3f}", result["document"])',
    ]
    return "\n".join(lines) + "\n"
