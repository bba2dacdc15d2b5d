"""Clients that others wrote, as they are, against the real server; the rest of them in tests/integrations."""

import cohere
import pytest
import requests
import schemathesis
from cohere.errors import BadRequestError, TooManyRequestsError, UnauthorizedError
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

import querit
from querit.serve.admission import Limits
from recipes.lib.teachers import Teacher, load_vllm
from tests.querit.serve.serving_for_tests import DOCUMENTS, QUERY, serving, tiny_ranker

TIDES = ["Feed the sourdough starter with flour.", "The Moon's gravity makes the sea rise twice a day."]


def client_of(client, **options):
    return cohere.ClientV2(api_key="secret", base_url=str(client.base_url), **options)


def test_cohere():
    with serving(keys=["secret"]) as client:
        answer = client_of(client).rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=2)
    wanted = tiny_ranker()(QUERY, DOCUMENTS, top_k=2)
    assert [result.index for result in answer.results] == [row["index"] for row in wanted]
    found = [result.relevance_score for result in answer.results]
    assert found == pytest.approx([row["probability"] for row in wanted], abs=1e-5)
    assert answer.meta.tokens.input_tokens > 0 and answer.id


def test_cohere_sees_its_own_errors():
    with serving(keys=["other"]) as client, pytest.raises(UnauthorizedError, match="API key"):
        client_of(client).rerank(model="m", query=QUERY, documents=DOCUMENTS)
    with serving() as client, pytest.raises(BadRequestError, match="documents"):
        client_of(client).rerank(model="m", query=QUERY, documents=[])
    with serving(limits=Limits(waiting=0)) as client, pytest.raises(TooManyRequestsError, match="waiting"):
        client_of(client, max_retries=0).rerank(model="m", query=QUERY, documents=DOCUMENTS)


def test_the_released_nano_answers():
    ranker = querit.load()
    with serving(ranker, name="querit-reranker-nano") as client:
        results = client_of(client).rerank(model="m", query="Why does the sea rise?", documents=TIDES).results
        assert client.get("/v1/models").json()["data"][0]["id"] == "querit-reranker-nano"
    assert [result.index for result in results] == [1, 0]
    assert [result.relevance_score for result in results] == pytest.approx(
        [row["probability"] for row in ranker("Why does the sea rise?", TIDES)], abs=1e-5
    )


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_what_the_openapi_page_says_is_so_whatever_is_sent(mode):
    """schemathesis writes requests, right and wrong ones, from /openapi.json. No 5xx, and answers as told there."""
    tried = set()

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data())
    def attempt(drawn):
        case = drawn.draw(operation.as_strategy(generation_mode=mode))
        # No schema says that there are as many queries as documents.
        unchecked = [positive_data_acceptance] if operation.path == "/score" else []
        case.call_and_validate(session=session, excluded_checks=unchecked)
        tried.add(operation.label)

    with serving(limits=Limits(documents=50)) as client, requests.Session() as session:
        session.trust_env = False
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            if mode is GenerationMode.POSITIVE or operation.method == "post":
                attempt()
    assert {"POST /rerank", "POST /v1/rerank", "POST /v2/rerank", "POST /score"} <= tried


def test_the_recipes_teacher_behind_vllms_api():
    queries, texts = [QUERY, "flour"], [DOCUMENTS, DOCUMENTS[1:]]
    with serving(limits=Limits(waiting=1)) as client:  # the second request is told to come again
        teacher = Teacher("any", kind="vllm", url=str(client.base_url))
        found = load_vllm(teacher, batch_size=8)(queries, texts)
    for query, several, scores in zip(queries, texts, found, strict=True):
        rows = sorted(tiny_ranker()(query, several), key=lambda row: row["index"])
        assert scores == pytest.approx([row["probability"] for row in rows], abs=1e-5)
