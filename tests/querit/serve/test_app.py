"""Each API's request and answer, over HTTP, beside what the pipeline says of the same texts."""

import json
import math

import pytest

from tests.querit.serve.serving_for_tests import DOCUMENTS, NAME, QUERY, serving, tiny_ranker


@pytest.fixture(scope="module")
def client():
    with serving() as client:
        yield client


def expected(documents=DOCUMENTS, query=QUERY, **options):
    """(index, probability), best first."""
    return [(row["index"], row["probability"]) for row in tiny_ranker()(query, documents, **options)]


def same(found, wanted):
    assert [index for index, _ in found] == [index for index, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=1e-5)


def tokens_of(pairs):
    tokenizer = tiny_ranker().tokenizer
    return sum(len(tokenizer(query, document)["input_ids"]) for query, document in pairs)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_jina(client, path):
    answer = client.post(path, json={"model": "any", "query": QUERY, "documents": DOCUMENTS}).json()
    same([(row["index"], row["relevance_score"]) for row in answer["results"]], expected())
    assert all(row["document"] == {"text": DOCUMENTS[row["index"]]} for row in answer["results"])
    assert answer["model"] == NAME and answer["id"]
    tokens = tokens_of([(QUERY, document) for document in DOCUMENTS])
    assert answer["usage"] == {"total_tokens": tokens, "prompt_tokens": tokens}


def test_jina_options(client):
    asked = {"query": QUERY, "documents": [{"title": "Sea", "text": DOCUMENTS[0]}, *DOCUMENTS[1:]]}
    rows = client.post("/v1/rerank", json={**asked, "top_n": 2, "return_documents": False}).json()["results"]
    same([(row["index"], row["relevance_score"]) for row in rows], expected(asked["documents"])[:2])
    assert all(set(row) == {"index", "relevance_score"} for row in rows)
    rows = client.post("/v1/rerank", json={**asked, "top_n": 0}).json()["results"]
    assert {"title": "Sea", "text": DOCUMENTS[0]} in [row["document"] for row in rows] and len(rows) == 4


def test_cohere(client):
    asked = {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    answer = client.post("/v2/rerank", json=asked).json()
    same([(row["index"], row["relevance_score"]) for row in answer["results"]], expected()[:3])
    assert answer["meta"]["tokens"]["input_tokens"] == tokens_of([(QUERY, document) for document in DOCUMENTS])


def test_text_embeddings_inference(client):
    asked = {"query": QUERY, "texts": DOCUMENTS}
    rows = client.post("/rerank", json=asked).json()
    same([(row["index"], row["score"]) for row in rows], expected())
    assert all("text" not in row for row in rows)
    rows = client.post("/rerank", json={**asked, "raw_scores": True, "return_text": True}).json()
    same([(row["index"], 1 / (1 + math.exp(-row["score"]))) for row in rows], expected())
    assert all(row["text"] == DOCUMENTS[row["index"]] for row in rows)


def test_text_embeddings_inference_refuses_what_it_may_not_cut(client):
    long = {"query": QUERY, "texts": ["tide " * 2000]}
    assert client.post("/rerank", json=long).status_code == 200
    refused = client.post("/rerank", json={**long, "truncate": False})
    assert refused.status_code == 413 and refused.json()["error_type"] == "Validation"


@pytest.mark.parametrize("keys", [("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2")])
def test_vllm_score(client, keys):
    answer = client.post("/score", json=dict(zip(keys, (QUERY, DOCUMENTS), strict=True))).json()
    assert answer["object"] == "list" and answer["model"] == NAME
    same([(row["index"], row["score"]) for row in answer["data"]], sorted(expected()))


def test_vllm_score_pairs_many_queries_with_as_many_documents(client):
    queries = ["tide", "flour", "batería", "海"]
    rows = client.post("/score", json={"queries": queries, "documents": DOCUMENTS}).json()["data"]
    pairs = zip(queries, DOCUMENTS, strict=True)
    same([(row["index"], row["score"]) for row in rows], [
        (place, expected([document], query)[0][1]) for place, (query, document) in enumerate(pairs)
    ])  # fmt: skip
    assert client.post("/score", json={"queries": queries, "documents": DOCUMENTS[:3]}).status_code == 400


def test_documents_are_cut_at_max_tokens_per_doc(client):
    long = [f"{document} {document} {document}" for document in DOCUMENTS]
    tokenizer = tiny_ranker().tokenizer
    cut = [tokenizer.decode(tokenizer(document, add_special_tokens=False)["input_ids"][:3]) for document in long]
    for path in ("/v1/rerank", "/v2/rerank"):
        rows = client.post(path, json={"query": QUERY, "documents": long, "max_tokens_per_doc": 3}).json()["results"]
        same([(row["index"], row["relevance_score"]) for row in rows], expected(cut))


def test_extensions(client):
    # No two windows of it are the same: they would tie.
    long = [" ".join(f"flour {number}" for number in range(400)) + " The tide rises twice a day.", "short"]
    asked = {"query": QUERY, "documents": long, "long_documents": "max_passage", "instruction": "about the sea"}
    rows = client.post("/v1/rerank", json=asked).json()["results"]
    options = {"long_documents": "max_passage", "instruction": "about the sea"}
    same([(row["index"], row["relevance_score"]) for row in rows], expected(long, **options))
    (passage,) = [row["passage"] for row in rows if row["index"] == 0]
    wanted = tiny_ranker()(QUERY, long, **options)
    assert tuple(passage) == next(row["passage"] for row in wanted if row["index"] == 0)


def test_equal_documents_keep_their_order(client):
    rows = client.post("/v1/rerank", json={"query": QUERY, "documents": ["same"] * 5}).json()["results"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]


def test_models_health_and_pages(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (NAME, tiny_ranker().max_length)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200
    assert "swagger" in client.get("/docs").text


def test_metrics_count_what_was_scored():
    with serving() as client:
        client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS})
        client.post("/v1/rerank", json={"query": QUERY})
        client.get("/private-path")
        lines = client.get("/metrics").text.splitlines()
    assert f"querit_tokens_total {tokens_of([(QUERY, document) for document in DOCUMENTS])}.0" in lines
    assert "querit_pairs_total 4.0" in lines
    for status, path in ((200, "/v1/rerank"), (422, "/v1/rerank"), (404, "other")):
        assert f'querit_requests_total{{path="{path}",status="{status}"}} 1.0' in lines
    assert not any("private-path" in line for line in lines)


ERRORS = {
    "/v1/rerank": (422, lambda body: isinstance(body["detail"], str)),
    "/v2/rerank": (400, lambda body: isinstance(body["message"], str)),
    "/score": (400, lambda body: body["error"]["code"] == 400 and isinstance(body["error"]["message"], str)),
}
HOSTILE = {
    "no object": b"[]",
    "no JSON": b"{",
    "nothing": b"",
    "not UTF-8": b'{"query": "\xff\xfe"}',
    "deep": b'{"query": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep where unread": b'{"query": "q", "documents": ["a"], "queries": "q", "x": ' + b"[" * 99_999,
    "a long number": b'{"query": "q", "top_n": ' + b"9" * 6000 + b', "documents": [1]}',
    "a large number": b'{"query": "q", "documents": ["a"], "queries": 1e400, "top_n": 1e400}',
    "not a number": b'{"query": "q", "queries": NaN, "documents": ["a"], "top_n": NaN}',
    "blank query": b'{"query": " \\n", "queries": " ", "documents": ["a"]}',
    "no documents": b'{"query": "q", "queries": "q", "documents": []}',
    "a wrong document": b'{"query": "q", "queries": "q", "documents": ["a", null]}',
    "blank instruction": b'{"query": "q", "queries": "q", "documents": ["a"], "instruction": ""}',
    "instruction without end": b'{"query": "q", "queries": "q", "documents": ["a"], "instruction": "'
    + b"go " * 5000
    + b'"}',
}


@pytest.mark.parametrize("path", list(ERRORS))
@pytest.mark.parametrize("name", list(HOSTILE))
def test_what_is_no_request_is_refused_in_the_apis_shape(client, path, name):
    answer = client.post(path, content=HOSTILE[name], headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    status, has_shape = ERRORS[path]
    assert answer.status_code in (400, status)
    assert has_shape(answer.json())


def test_the_body_tells_whose_errors_rerank_has(client):
    assert set(client.post("/rerank", json={"texts": ["a"]}).json()) == {"error", "error_type"}
    assert set(client.post("/rerank", json={"documents": ["a"]}).json()) == {"detail"}
    assert set(client.post("/rerank", content=b"{").json()) >= {"detail"}


def test_another_content_type_is_refused_with_the_fix(client):
    body = b'{"query": "q", "documents": ["a"]}'
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        answer = client.post("/v1/rerank", content=body, headers=headers)
        assert answer.status_code == 422 and "application/json" in answer.json()["detail"]


@pytest.mark.parametrize("value", [True, "2", 1.5, [2], 1e400], ids=repr)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_what_is_no_whole_number_is_none(client, path, value):
    for name in ("top_n", "max_tokens_per_doc"):
        asked = json.dumps({"query": QUERY, "documents": DOCUMENTS, name: value})
        answer = client.post(path, content=asked, headers={"Content-Type": "application/json"})
        assert answer.status_code == ERRORS[path][0] and name in answer.text, answer.text
    asked = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2.0}  # to JSON it is one
    assert len(client.post(path, json=asked).json()["results"]) == 2


@pytest.mark.parametrize("value", ["false", "no", 0, 1.0])
def test_only_true_and_false_are_switches(client, value):
    for name in ("raw_scores", "return_text", "truncate"):
        answer = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, name: value})
        assert answer.status_code == 422 and name in answer.json()["error"]
    answer = client.post("/rerank", json={"query": QUERY, "documents": DOCUMENTS, "return_documents": value})
    assert answer.status_code == 422 and "return_documents" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/rerank", {"query": "q", "documents": ["a", 3]}, "documents.1: "),
        ("/v1/rerank", {"query": "q", "documents": [{"body": "a"}]}, "documents.0.text: Field required"),
        ("/rerank", {"documents": ["a"]}, "query: Field required"),
        ("/score", {"queries": ["q", " "], "documents": ["a", "b"]}, "queries.1: it is blank"),
    ],
)
def test_errors_name_the_field_and_nothing_of_the_code(client, path, body, place):
    told = client.post(path, json=body).text
    assert place in told and not any(name in told for name in ("function", "list[", "Document", "JINA", ".query"))


def test_half_a_character_is_read_as_the_sign_for_it(client):
    body = b'{"query": "tide \\ud83d", "documents": ["rises \\ude00", "flour"]}'
    rows = client.post("/v1/rerank", content=body, headers={"Content-Type": "application/json"}).json()["results"]
    same([(row["index"], row["relevance_score"]) for row in rows], expected(["rises \ufffd", "flour"], "tide \ufffd"))


def test_unknown_paths_and_methods_are_told_so(client):
    assert client.get("/nowhere").status_code == 404
    assert client.get("/v1/rerank").status_code == 405
