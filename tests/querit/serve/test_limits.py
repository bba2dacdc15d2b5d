"""Who is let in, with how much, for how long; and what is written of it."""

import hashlib
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

import querit
from querit.serve.admission import Limits
from tests.models_for_tests import folder_of
from tests.querit.serve.serving_for_tests import DOCUMENTS, QUERY, serving, tiny_ranker

ASKED = {"query": QUERY, "documents": DOCUMENTS, "texts": DOCUMENTS, "queries": QUERY}
PATHS = {"/v1/rerank": "detail", "/v2/rerank": "message", "/score": "error", "/rerank": "error"}


@contextmanager
def scoring_held():
    """A ranker of its own that scores nothing until it is let go; the texts are encoded as always."""
    ranker = querit.load(folder_of("bert"), dtype="float32")
    score_pairs, go, scored = ranker.score_pairs, threading.Event(), []

    def held(pairs, *options):
        scored.append(len(pairs))
        assert go.wait(60)
        return score_pairs(pairs, *options)

    ranker.score_pairs = held
    try:
        yield ranker, go, scored
    finally:
        go.set()


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def in_background(call):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


@pytest.mark.parametrize("path", list(PATHS))
def test_without_a_key_nothing_is_answered(path):
    with serving(keys=["secret-1", "secret-2"]) as client:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret-1"},
            {"Authorization": "Bearer"},
        ):
            answer = client.post(path, json=ASKED, headers=given)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert PATHS[path] in answer.json()
        assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == client.get("/openapi.json").status_code == 200
        for key in ("secret-1", "secret-2"):
            assert client.post(path, json=ASKED, headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(given, known):
        compared.append((given, known))
        return given == known

    monkeypatch.setattr("querit.serve.admission.hmac.compare_digest", compare)
    with serving(keys=["one", "two"]) as client:
        client.get("/v1/models", headers={"Authorization": "Bearer one"})
    one, two = (hashlib.sha256(key).digest() for key in (b"one", b"two"))
    assert compared == [(one, one), (one, two)]  # the second too, though the first is it


@pytest.mark.parametrize("path", list(PATHS))
def test_too_many_documents_or_characters(path):
    with serving(limits=Limits(documents=3)) as client:
        answer = client.post(path, json=ASKED)
        assert answer.status_code == 413 and PATHS[path] in answer.json() and "at most 3 documents" in answer.text
    with serving(limits=Limits(characters=50)) as client:
        answer = client.post(path, json=ASKED)
        assert answer.status_code == 413 and "at most 50 characters" in answer.text
        answer = client.post("/v1/rerank", json={"query": "q", "documents": ["d"], "instruction": "go " * 20})
        assert answer.status_code == 413


@pytest.mark.parametrize("path", list(PATHS))
def test_a_body_is_never_read_beyond_its_limit(path):
    sent = 0

    def endless():
        nonlocal sent
        yield b'{"query": "'
        for _ in range(1000):
            sent += 10_000
            yield b"a" * 10_000

    with serving(limits=Limits(body_bytes=50_000)) as client:
        told = client.post(path, content=b"a" * 60_000, headers={"Content-Type": "application/json"})
        assert told.status_code == 413 and PATHS[path] in told.json()
        try:  # told in chunks, its size is found out while reading
            answer = client.post(path, content=endless(), headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
        except httpx.WriteError:  # the server hung up
            pass
        assert client.post(path, json=ASKED).status_code == 200
    assert sent < 9_000_000


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_back():
    with scoring_held() as (ranker, go, _), serving(ranker, Limits(waiting=2)) as client:
        waiting = [in_background(lambda: client.post("/v1/rerank", json=ASKED)) for _ in range(2)]
        until(lambda: "querit_in_flight 2.0" in client.get("/metrics").text)
        for path, key in PATHS.items():
            answer = client.post(path, json=ASKED)
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1 and key in answer.json()
        assert client.get("/health").status_code == 200
        go.set()
        for thread, answers in waiting:
            thread.join()
            assert answers[0].status_code == 200
        assert client.post("/v1/rerank", json=ASKED).status_code == 200


def test_a_request_whose_time_is_over_is_told_so_and_costs_no_more():
    with scoring_held() as (ranker, go, scored), serving(ranker, Limits(seconds=0.5)) as client:
        first = in_background(lambda: client.post("/v1/rerank", json=ASKED))
        until(lambda: scored)
        late = client.post("/v2/rerank", json={**ASKED, "documents": ["never scored"] * 9})
        assert late.status_code == 504 and "0.5 seconds" in late.json()["message"]
        go.set()
        first[0].join()
        assert client.post("/v1/rerank", json=ASKED).status_code == 200
        assert "querit_in_flight 0.0" in client.get("/metrics").text
    assert sum(scored) == 2 * len(DOCUMENTS)  # the late one's nine are not among them


def test_a_client_that_hangs_up_costs_no_more():
    with scoring_held() as (ranker, go, scored), serving(ranker) as client:
        first = in_background(lambda: client.post("/v1/rerank", json=ASKED))
        until(lambda: scored)
        body = json.dumps({**ASKED, "documents": ["never scored"] * 9}).encode()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as other:
            head = (
                f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            other.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: "querit_in_flight 2.0" in client.get("/metrics").text)  # it has come, and waits
        until(lambda: "querit_in_flight 1.0" in client.get("/metrics").text)
        go.set()
        first[0].join()
        assert client.post("/v1/rerank", json=ASKED).status_code == 200
    assert sum(scored) == 2 * len(DOCUMENTS)


def test_a_body_that_does_not_come_is_not_waited_for():
    with serving(limits=Limits(seconds=0.5)) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
            slow.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(12) == b"HTTP/1.1 408"
        assert "querit_in_flight 0.0" in client.get("/metrics").text


def test_no_text_is_logged_when_all_is_well_and_when_not(caplog, monkeypatch):
    ranker = querit.load(folder_of("bert"), dtype="float32")
    with caplog.at_level(logging.DEBUG), serving(ranker) as client:
        asked = {"query": "private query", "documents": ["private document"], "instruction": "private words"}
        assert client.post("/v1/rerank?text=private", json=asked).status_code == 200
        assert client.post("/v1/rerank", json={**asked, "top_n": "private"}).status_code == 422

        def broken(*_):
            raise KeyError(asked["documents"][0])

        monkeypatch.setattr(ranker, "score_pairs", broken)
        answer = client.post("/v1/rerank", json=asked)
        assert answer.status_code == 500 and answer.headers["x-request-id"] in answer.json()["detail"]
    ours = [record for record in caplog.records if record.name.startswith(("querit", "uvicorn", "fastapi", "asyncio"))]
    assert "private" not in "".join(record.getMessage() + str(record.exc_info or "") for record in ours)
    assert "1 documents" in caplog.text and "KeyError" in caplog.text


def test_many_at_once_get_each_their_own():
    asked = [[f"{number} {document}" for document in DOCUMENTS] for number in range(40)]
    with serving() as client:
        answers: dict = {}

        def ask(number):
            answers[number] = client.post("/rerank", json={"query": QUERY, "texts": asked[number]}).json()

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, documents in enumerate(asked):
        wanted = {row["index"]: row["probability"] for row in tiny_ranker()(QUERY, documents)}
        found = {row["index"]: row["score"] for row in answers[number]}
        assert found == pytest.approx(wanted, abs=1e-5)
