"""The endpoints as a program uses them, over HTTP."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from space_app import ranking
from space_app.evaluation import examples
from tests.space_app.test_ranking import DOCUMENTS, QUERY


@pytest.fixture(scope="module")
def client(site):
    return Client(site, verbose=False)


def test_rank_gives_what_the_pipeline_gives(client, models):
    found = client.predict(QUERY, DOCUMENTS, model="Tiny", api_name="/rank")
    expected = models.ranker("Tiny")(QUERY, DOCUMENTS)
    assert [row["index"] for row in found] == [row["index"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    assert [row["document"] for row in found] == [row["document"] for row in expected]
    assert {row["first_stage_place"] for row in found} == {1, 2, 3}
    passages = client.predict(QUERY, ["word " * 1500], "", "max_passage", "Tiny", api_name="/rank")
    assert len(passages[0]["passage"]) == 2


def test_explain_compare_and_models(client):
    assert client.predict(api_name="/models") == ["Nano", "Causal", "Tiny"]
    found = client.predict(QUERY, "The tide rises at noon. Flour is dear.", api_name="/explain")
    assert [row["text"] for row in found["sentences"]] == ["The tide rises at noon.", "Flour is dear."]
    assert found["best"] == 0 and found["passages"] == 1
    found = client.predict(QUERY, DOCUMENTS, "BM25", "Nano", api_name="/compare")
    assert sum(row["change"] for row in found["right"]) == 0 and 0 <= found["agreement"] <= 1


def test_evaluate_takes_a_file(client, tmp_path):
    rows = [
        {"query": e["query"], "positive": e["documents"][e["answer"]], "negative": e["documents"][:2]}
        for e in examples()[:3]
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = client.predict(handle_file(tmp_path / "set.jsonl"), "Nano", api_name="/evaluate")
    assert len(found["queries"]) == 3 and 0 < found["before"] <= 1 and 0 < found["after"] <= 1
    with pytest.raises(AppError, match="long_documents must be one of"):
        client.predict(handle_file(tmp_path / "set.jsonl"), "Nano", "all", api_name="/evaluate")


def test_the_types_are_told(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/rank", "/explain", "/compare", "/evaluate", "/models"}
    types = {p["parameter_name"]: p["python_type"]["type"] for p in endpoints["/rank"]["parameters"]}
    assert types["query"] == "str" and types["documents"].lower().startswith("list[str")
    assert "best first" in endpoints["/rank"]["description"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"query": " "}, "Type a query"),
        ({"documents": ["x"] * 201}, "201 documents; at most 200"),
        ({"documents": "text"}, "list of texts"),
        ({"documents": [{"text": 1}]}, "list of texts"),
        ({"documents": None}, "list of texts"),
        ({"model": "evil/repo"}, "no such model here"),
        ({"instruction": "Find proofs."}, "trained without instructions"),
        ({"long_documents": "<b>"}, "long_documents must be one of"),
    ],
)
def test_the_same_limits_hold(client, given, words):
    with pytest.raises(AppError, match=words):
        client.predict(**{"query": QUERY, "documents": DOCUMENTS, **given}, api_name="/rank")


def test_files_that_were_not_uploaded_cannot_be_named(client, site):
    for path in ("/etc/passwd", str(__file__)):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises((AppError, ValueError)):
            client.predict(file, "Nano", api_name="/evaluate")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{site}gradio_api/file={path}")  # noqa: S310
        assert refusal.value.code == 403


def test_a_body_over_the_limit_is_refused_whether_its_size_is_told_or_not(site):
    def chunks():
        for _ in range(40):
            yield b" " * 1_000_000

    for body in (b" " * 30_000_000, chunks()):
        request = urllib.request.Request(f"{site}gradio_api/queue/join", body, {"Content-Type": "application/json"})  # noqa: S310
        with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refusal:
            urllib.request.urlopen(request)  # noqa: S310
        assert getattr(refusal.value, "code", 413) == 413


def test_a_crash_is_told_to_its_caller_alone(client, monkeypatch):
    def crash(*args):
        raise RuntimeError("secret detail")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(ranking, "rank", crash)
        with pytest.raises(AppError) as failure:
            client.predict(QUERY, DOCUMENTS, api_name="/rank")
    assert "secret" not in str(failure.value)
    assert len(client.predict(QUERY, DOCUMENTS, api_name="/rank")) == 3


def test_cancelling_frees_the_worker(client, models, monkeypatch):
    scored = []

    def slow(*args):
        scored.append(1)
        time.sleep(0.05)
        return score_pairs(*args)

    score_pairs = ranking.score_pairs
    monkeypatch.setattr(ranking, "score_pairs", slow)
    monkeypatch.setattr(ranking, "STEP_TOKENS", 16)
    job = client.submit(QUERY, [f"text {n}" for n in range(200)], model="Tiny", api_name="/rank")
    until = time.monotonic() + 10
    while len(scored) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(scored) >= 3 and job.cancel()
    time.sleep(0.5)
    stopped = len(scored)
    time.sleep(1)
    assert len(scored) == stopped < 150
    assert len(client.predict(QUERY, DOCUMENTS, model="Tiny", api_name="/rank")) == 3


def test_many_at_once_get_each_their_own(site):
    found, clients = {}, [Client(site, verbose=False) for _ in range(6)]

    def ask(number):
        documents = [f"tide number {number}, text {place}" for place in range(5)]
        for _ in range(3):
            rows = clients[number].predict(f"tide {number}", documents, model="Tiny", api_name="/rank")
            found.setdefault(number, []).append(sorted(row["document"] for row in rows) == sorted(documents))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: [True] * 3 for number in range(6)}
