"""The endpoints: each reads its API's request, has it scored, and answers in its API's form."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from querit.serve import schemas
from querit.serve.admission import Admission, Limits
from querit.serve.batcher import Batcher
from querit.serve.errors import INVALID, ApiError, error_response
from querit.serve.jobs import Answer, Job, Scored, TooLongError
from querit.serve.metrics import Metrics

DESCRIPTION = "Rerank documents with the APIs of Jina, Cohere, text-embeddings-inference and vLLM."


def failures(model: Any) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model} for status in ("4XX", "5XX")}


def create_app(ranker: Any, name: str, limits: Limits | None = None, keys: Sequence[str] = ()) -> FastAPI:
    """The app over `ranker`, a text-ranking pipeline that answers call `name`.

    keys: API keys, of which a request must bring one; none are asked for if there are none.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(ranker, metrics.observe_round)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="querit serve", description=DESCRIPTION, lifespan=lifespan, redoc_url=None)
    app.state.batcher = batcher

    async def scored(request: Request, requests: list[tuple[str, list]], asked: schemas.Scoring, **options) -> Answer:
        documents = sum(len(several) for _, several in requests)
        if documents > limits.documents:
            raise ApiError(413, f"A request has at most {limits.documents:,} documents, not {documents:,}.")
        plain = [
            (query, [doc if isinstance(doc, str) else doc.model_dump() for doc in several])
            for query, several in requests
        ]
        characters = sum(len(query) + sum(map(characters_of, several)) for query, several in plain)
        characters += len(asked.instruction or "")
        if characters > limits.characters:
            raise ApiError(413, f"A request has at most {limits.characters:,} characters, not {characters:,}.")
        job = Job(plain, asked.instruction, asked.long_documents, **options)
        answer = await wait_for(request, batcher, job)
        request.state.told = f"{documents} documents {answer.tokens} tokens"
        return answer

    async def jina(request: Request, asked: schemas.JinaRequest) -> schemas.JinaAnswer:
        documents = asked.documents
        answer = await scored(request, [(asked.query, documents)], asked, max_tokens_per_doc=asked.max_tokens_per_doc)
        shown = asked.return_documents is not False
        results = [
            schemas.JinaResult(
                index=result.index,
                relevance_score=result.probability,
                document=as_document(documents[result.index]) if shown else None,
                passage=result.passage,
            )
            for result in best_first(answer, asked.top_n)
        ]
        usage = schemas.JinaUsage(total_tokens=answer.tokens, prompt_tokens=answer.tokens)
        return schemas.JinaAnswer(id=f"rerank-{request.state.id}", model=name, usage=usage, results=results)

    async def tei(request: Request, asked: schemas.TeiRequest) -> list[schemas.TeiResult]:
        answer = await scored(request, [(asked.query, asked.texts)], asked, truncate=asked.truncate is not False)
        return [
            schemas.TeiResult(
                index=result.index,
                score=result.logit if asked.raw_scores else result.probability,
                text=asked.texts[result.index] if asked.return_text else None,
            )
            for result in best_first(answer)
        ]

    @app.post("/v1/rerank", responses=failures(schemas.JinaError), response_model_exclude_none=True)
    async def rerank_v1(request: Request, asked: schemas.JinaRequest) -> schemas.JinaAnswer:
        """Jina's rerank, and vLLM's."""
        return await jina(request, asked)

    @app.post("/rerank", responses=failures(schemas.JinaError | schemas.TeiError), response_model_exclude_none=True)
    async def rerank(request: Request, asked: schemas.RerankRequest) -> schemas.JinaAnswer | list[schemas.TeiResult]:
        """With `documents` Jina's rerank, with `texts` that of text-embeddings-inference."""
        if isinstance(asked, schemas.TeiRequest):
            request.state.api = "tei"
            return await tei(request, asked)
        request.state.api = "jina"
        return await jina(request, asked)

    @app.post("/v2/rerank", responses=failures(schemas.CohereError))
    async def rerank_v2(request: Request, asked: schemas.CohereRequest) -> schemas.CohereAnswer:
        """Cohere's rerank."""
        answer = await scored(
            request, [(asked.query, asked.documents)], asked, max_tokens_per_doc=asked.max_tokens_per_doc
        )
        results = [
            schemas.CohereResult(index=result.index, relevance_score=result.probability)
            for result in best_first(answer, asked.top_n)
        ]
        meta = {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": answer.tokens, "output_tokens": 0},
        }
        return schemas.CohereAnswer(id=request.state.id, results=results, meta=meta)

    @app.post("/score", responses=failures(schemas.VllmError))
    async def score(request: Request, asked: schemas.ScoreRequest) -> schemas.ScoreAnswer:
        """vLLM's score, in the order asked."""
        queries = [asked.queries] if isinstance(asked.queries, str) else asked.queries
        documents = [asked.documents] if isinstance(asked.documents, str) else asked.documents
        if len(queries) == 1:
            requests = [(queries[0], documents)]
        elif len(queries) == len(documents):
            requests = [(query, [document]) for query, document in zip(queries, documents, strict=True)]
        else:
            raise ApiError(400, f"{len(queries)} queries go with as many documents, not with {len(documents)}.")
        answer = await scored(request, requests, asked, max_tokens_per_doc=asked.max_tokens_per_doc)
        return schemas.ScoreAnswer(
            id=f"score-{request.state.id}",
            created=int(time.time()),
            model=name,
            data=[schemas.ScoreResult(index=result.index, score=result.probability) for result in answer.results],
            usage=schemas.ScoreUsage(prompt_tokens=answer.tokens, total_tokens=answer.tokens),
        )

    @app.get("/v1/models", responses=failures(schemas.VllmError))
    async def models() -> schemas.ModelList:
        """The one model that is served."""
        return schemas.ModelList(data=[schemas.ModelCard(id=name, created=started, max_model_len=ranker.max_length)])

    @app.head("/health", include_in_schema=False)  # some monitors ask for no more
    @app.get("/health", responses=failures(schemas.VllmError))
    async def health() -> dict[str, str]:
        """200 while requests are taken and scored."""
        if not batcher.is_alive:
            raise ApiError(503, "Nothing is scored any more: restart the server.")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error_response(request.state.api, error.status, error.message)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if request.state.api == "either":
            request.state.api = schemas.rerank_form(error.body).lower()
        return error_response(request.state.api, INVALID[request.state.api], problems(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(request.state.api, error.status_code, error.detail)
        response.headers.update(error.headers or {})
        return response

    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.body_bytes)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Admission, limits=limits, keys=keys, metrics=metrics, paths=paths)
    return app


async def wait_for(request: Request, batcher: Batcher, job: Job) -> Answer:
    """The job's answer. When the client is gone, or the request's time is over, it costs no more."""
    try:
        future = batcher.submit(job)
    except RuntimeError as error:
        raise ApiError(503, str(error)) from None
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(disconnected(request))
    both: set[asyncio.Future] = {answer, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client is gone.")
        return await answer
    except TooLongError as error:
        raise ApiError(413, str(error)) from None
    except ValueError as error:
        raise ApiError(INVALID[request.state.api], str(error)) from None
    except (MemoryError, RuntimeError) as error:  # of memory, or a device's process that died
        raise ApiError(503, str(error)) from None
    finally:
        gone.cancel()
        future.cancel()  # now: answer.cancel() would reach it in the loop's next turn, when the client has its response


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def problems(error: RequestValidationError) -> str:
    """Where and what, and never the value: it is the client's text, of any size."""
    found = []
    for each in error.errors()[:8]:
        # Without the names of kinds (JINA, Document, list[...]), of which a client knows nothing.
        place = [str(key) for key in each["loc"][1:] if re.fullmatch("[a-z0-9_]+", str(key))]
        if each["type"] == "json_invalid":
            found.append(f"the body is no JSON: {each['ctx']['error']} at character {place[0]}")
        elif each["type"] == "model_attributes_type" and len(place) < 2:
            found.append("send a JSON object, with the header `Content-Type: application/json`")
        elif each["type"] == "string_pattern_mismatch":
            found.append(f"{'.'.join(place)}: it is blank")
        else:
            found.append(f"{'.'.join(place) or 'the body'}: {each['msg']}")
    return "; ".join(found)


def best_first(answer: Answer, top_n: int | None = None) -> list[Scored]:
    """Equal ones in the order asked."""
    return sorted(answer.results, key=lambda result: -result.logit)[: top_n or None]


def as_document(document: str | schemas.Document) -> schemas.Document:
    return schemas.Document(text=document) if isinstance(document, str) else document


def characters_of(document: str | dict) -> int:
    return len(document) if isinstance(document, str) else len(document["text"]) + len(document["title"] or "")
