"""The batcher with a real, tiny ranker: what is scored together, in which order, and what is not scored at all."""

import threading

import pytest
import torch

import querit
from querit.serve.batcher import LEAST_ROUND_TOKENS, Batcher
from querit.serve.jobs import Job
from tests.models_for_tests import folder_of, save_folder, tiny_model
from tests.querit.serve.serving_for_tests import DOCUMENTS, QUERY, tiny_ranker

LONG = [f"{place} {DOCUMENTS[place % 4]}" for place in range(600)]


class Held:
    """Keeps the scoring thread at the end of its first round until all jobs wait."""

    def __init__(self):
        self.rounds, self.go, self.first = [], threading.Event(), threading.Event()

    def __call__(self, scored):
        self.rounds.append(scored)
        self.first.set()
        assert self.go.wait(60)


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def batcher(held):
    """Its rounds are of LEAST_ROUND_TOKENS."""
    batcher = Batcher(tiny_ranker(), held, round_seconds=0)
    batcher.round_tokens = LEAST_ROUND_TOKENS
    batcher.submit(Job([("first", ["document"])]))
    assert held.first.wait(60)
    yield batcher
    held.go.set()
    batcher.close()


def probabilities(answer):
    return [result.probability for result in answer.results]


def alone(query, documents):
    rows = sorted(tiny_ranker()(query, documents), key=lambda row: row["index"])
    return pytest.approx([row["probability"] for row in rows], abs=1e-5)


def test_requests_that_wait_are_scored_together_as_alone(batcher, held):
    asked = [(f"{QUERY} {number}", DOCUMENTS[: 1 + number % 4]) for number in range(20)]
    futures = [batcher.submit(Job([each])) for each in asked]
    held.go.set()
    for each, future in zip(asked, futures, strict=True):
        assert probabilities(future.result(60)) == alone(*each)
    assert max(scored.requests for scored in held.rounds) > 2
    assert all(scored.tokens < LEAST_ROUND_TOKENS + tiny_ranker().max_length for scored in held.rounds)


def test_a_long_request_does_not_starve_short_ones(batcher, held):
    order = []
    jobs = {"long": Job([(QUERY, LONG)]), "a": Job([(QUERY, DOCUMENTS)]), "b": Job([(QUERY, DOCUMENTS)])}
    for name, job in jobs.items():
        job.future.add_done_callback(lambda _, name=name: order.append((name, len(held.rounds))))
        batcher.submit(job)
    held.go.set()
    assert probabilities(jobs["long"].future.result(60)) == alone(QUERY, LONG)
    (_, a), (_, b), (_, long) = order
    assert [name for name, _ in order] == ["a", "b", "long"]
    assert a <= b <= 4 and long > 20


def test_a_cancelled_request_costs_no_more(batcher, held):
    job, other = Job([(QUERY, LONG)]), Job([(QUERY, DOCUMENTS)])
    batcher.submit(job)
    batcher.submit(other)
    assert job.future.cancel()
    held.go.set()
    assert probabilities(other.future.result(60)) == alone(QUERY, DOCUMENTS)
    assert sum(scored.pairs for scored in held.rounds) == 1 + len(DOCUMENTS)


def test_one_is_cancelled_half_way(batcher, held):
    job = Job([(QUERY, LONG)])
    half = threading.Event()

    def observe(scored):
        held.rounds.append(scored)
        if len(held.rounds) == 5:
            job.future.cancel()
            half.set()

    batcher.observe = observe
    batcher.submit(job)
    held.go.set()
    assert half.wait(60)
    batcher.submit(Job([(QUERY, DOCUMENTS)])).result(60)
    assert sum(scored.pairs for scored in held.rounds) < len(LONG) / 3


def test_what_was_taken_is_answered_at_the_end(held):
    batcher = Batcher(tiny_ranker(), round_seconds=0)
    futures = [batcher.submit(Job([(QUERY, LONG[:50])])) for _ in range(5)]
    batcher.close()
    assert all(future.done() and len(future.result().results) == 50 for future in futures)
    with pytest.raises(RuntimeError, match="shutting down"):
        batcher.submit(Job([(QUERY, DOCUMENTS)]))


def test_only_the_request_that_is_to_blame_fails(tmp_path):
    model = tiny_model("bert")
    tokenizer = tiny_ranker().tokenizer
    token = min(set(tokenizer("flour")["input_ids"]) - set(tokenizer(QUERY, "tide")["input_ids"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    batcher = Batcher(querit.load(save_folder(tmp_path / "broken", "bert", model), dtype="float32"))
    jobs = [Job([(QUERY, [text])]) for text in ("tide", "flour", "tide tide")]
    bad = Job([(QUERY, DOCUMENTS)], instruction="go " * 5000)
    for job in (*jobs, bad):
        batcher.submit(job)
    batcher.close()
    assert [type(job.future.exception()) for job in jobs] == [type(None), FloatingPointError, type(None)]
    assert isinstance(bad.future.exception(), ValueError)
    assert probabilities(jobs[2].future.result()) == alone(QUERY, ["tide tide"])


def test_a_process_that_dies_fails_its_round_and_the_next_one_is_scored():
    with querit.load(folder_of("bert"), devices=["cpu"]) as ranker:
        batcher = Batcher(ranker)
        first = batcher.submit(Job([(QUERY, DOCUMENTS)])).result(120)
        (worker,) = ranker.workers
        worker.process.kill()
        with pytest.raises(RuntimeError, match="next call starts new"):
            batcher.submit(Job([(QUERY, LONG)])).result(120)
        again = batcher.submit(Job([(QUERY, DOCUMENTS)])).result(120)
        assert probabilities(again) == pytest.approx(probabilities(first), abs=1e-6)
        batcher.close()
