"""What the page computes, against the pipeline called directly."""

import time

import pytest

from modeling_querit.pipeline_querit import TextRankingPipeline
from querit import bm25
from space_app import ranking
from space_app.evaluation import examples
from space_app.limits import Limits, RefusedError
from space_app.ranking import BM25, compare, explain, first_stage_beside, make_request, rank, split_sentences

QUERY = "When does the tide rise?"
DOCUMENTS = ["The tide rises twice a day.", "Feed the starter with flour.", "Una batería dura más si no se calienta."]


def finish(steps):
    """-> what the steps return, and the shares that they told."""
    shares = []
    while True:
        try:
            shares.append(next(steps))
        except StopIteration as end:
            return end.value, shares


@pytest.fixture
def asked(models, limits):
    def make(query=QUERY, documents=DOCUMENTS, **options):
        return make_request(models, limits, query, documents, **options)

    return make


@pytest.mark.parametrize(
    ("name", "options"),
    [("Tiny", {}), ("Causal", {"instruction": "Find proofs."}), ("Tiny", {"long_documents": "max_passage"})],
)
def test_a_ranking_is_the_pipelines(models, limits, asked, name, options):
    documents = [*DOCUMENTS, "word " * 900 + "The tide rises at noon."]
    found, shares = finish(rank(models, limits, asked(documents=documents, model=name, **options)))
    expected = models.ranker(name)(QUERY, documents, **options)
    assert [result.index for result in found.results] == [row["index"] for row in expected]
    assert [result.score for result in found.results] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    assert [result.truncated for result in found.results] == [row["truncated"] for row in expected]
    assert [result.passage for result in found.results] == [row.get("passage") for row in expected]
    assert any(result.truncated or result.passage for result in found.results)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_places_before_are_those_of_bm25(models, limits, asked):
    documents = ["Nothing of it here.", "The tide comes, the tide goes.", "A tide.", "Nothing either."]
    found, _ = finish(rank(models, limits, asked("tide", documents, model="Nano")))
    scores = bm25.BM25(models.ranker("Nano").tokenizer, documents).scores("tide")
    assert scores[1] > 0 and scores[2] > 0 and scores[0] == scores[3] == 0
    # Those without a word of the query keep the order given.
    assert found.first_stage[2:] == [0, 3] == [i for i in bm25.best_first(scores) if scores[i] == 0]
    assert {result.index: result.before for result in found.results}[3] == 4


def test_bm25_finds_words_of_languages_without_blanks(models):
    tokenizer = models.ranker("Nano").tokenizer
    for query, documents in (("潮汐", ["面包和黄油", "月亮引起潮汐"]), ("満潮", ["パンとバター", "今日の満潮は正午"])):
        scores = bm25.BM25(tokenizer, documents).scores(query)
        assert scores[1] > scores[0]


@pytest.mark.parametrize("documents", [[""], ["", " "], ["\x00"], ["\u200b", "tide"]])
def test_documents_without_a_word_are_ranked_too(models, limits, asked, documents):
    found, _ = finish(rank(models, limits, asked("tide", documents, model="Tiny")))
    assert sorted(result.index for result in found.results) == list(range(len(documents)))


def test_equal_documents_score_equal_though_scored_in_steps(models, limits, asked, monkeypatch):
    monkeypatch.setattr(ranking, "STEP_TOKENS", 64)
    documents = [text for number in range(12) for text in ("The same text.", f"Text {number} " * (1 + number % 5))]
    found, shares = finish(rank(models, limits, asked(documents=documents, model="Tiny")))
    assert len(shares) > 3
    same = [result for result in found.results if result.index % 2 == 0]
    assert len({result.score for result in same}) == 1 and [r.index for r in same] == sorted(r.index for r in same)


def test_what_is_stopped_scores_no_more_and_frees_the_model(models, limits, asked, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(len(args[1]))
        return score_pairs(*args)

    score_pairs = ranking.score_pairs
    monkeypatch.setattr(ranking, "score_pairs", counted)
    monkeypatch.setattr(ranking, "STEP_TOKENS", 32)
    steps = rank(models, limits, asked(documents=[f"text {number}" for number in range(40)], model="Tiny"))
    next(steps), next(steps)
    steps.close()
    assert len(calls) == 2 and models.turn.acquire(blocking=False)
    models.turn.release()


def test_time_is_limited(models, asked):
    with pytest.raises(RefusedError, match=r"took too long .* Give fewer or shorter documents"):
        finish(rank(models, Limits(seconds=-1), asked(model="Tiny")))
    assert models.turn.acquire(blocking=False)
    models.turn.release()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"query": "  "}, "Type a query"),
        ({"query": 7}, "query must be text"),
        ({"query": "x" * 2001}, "2,001 characters; at most 2,000"),
        ({"documents": []}, "Give documents"),
        ({"documents": "one"}, "list of texts"),
        ({"documents": ["one", None]}, "list of texts"),
        ({"documents": ["x"] * 201}, "201 documents; at most 200"),
        ({"documents": ["x" * 1_000_001] * 2}, "2,000,002 characters together; at most 2,000,000"),
        ({"instruction": "x" * 1001}, "1,001 characters"),
        ({"instruction": ["x"]}, "instruction must be text"),
        ({"long_documents": "all"}, "truncate, max_passage"),
        ({"model": "evil/repo"}, "no such model here; choose one of Nano, Causal, Tiny"),
        ({"model": {"a": 1}}, "no such model"),
    ],
)
def test_what_is_over_a_limit_or_of_another_kind_is_refused_in_words(asked, given, words):
    with pytest.raises(RefusedError, match=words):
        asked(**given)


def test_lone_surrogates_become_characters_that_can_be_sent(models, limits, asked):
    request = asked("ti\ud800de", ["a\udfff"], instruction="\ud801", model="Causal")
    assert (request.query, request.documents, request.instruction) == ("ti\ufffdde", ["a\ufffd"], "\ufffd")


def test_an_explanation_scores_the_sentences_of_what_was_read(models, limits, asked):
    ranker = models.ranker("Tiny")
    sentences = ["The tide rises twice a day.", "Flour is dear this year.", "Nobody knows the baker's name."]
    found, shares = finish(explain(models, limits, asked(documents=["x", " ".join(sentences)], model="Tiny"), 1))
    assert [text for text, _ in found.sentences] == sentences
    expected = {row["index"]: row["probability"] for row in ranker(QUERY, sentences)}
    assert [p for _, p in found.sentences] == pytest.approx([expected[i] for i in range(3)], abs=1e-4)
    assert found.best == max(expected, key=expected.get) and (found.windows, found.start) == (1, 0)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_an_explanation_of_a_long_document_is_of_the_passage_that_counted(models, limits):
    example = next(example for example in examples() if example["name"] == "A long document")
    request = make_request(models, limits, example["query"], example["documents"], None, "max_passage", "Nano")
    found, _ = finish(explain(models, limits, request, 0))
    document = example["documents"][0]
    (row,) = models.ranker("Nano")(example["query"], [document], long_documents="max_passage")
    assert (found.start, found.end) == row["passage"] and found.windows > 1
    assert all(text in document[found.start : found.end] for text, _ in found.sentences)
    assert "fog horn" in found.sentences[found.best][0]
    cut = make_request(models, limits, example["query"], example["documents"], None, "truncate", "Nano")
    found, _ = finish(explain(models, limits, cut, 0))
    assert found.start == 0 and found.end < len(document) and found.windows == 1


def test_an_explanation_is_bounded(models, asked):
    document = " ".join(f"Sentence number {number} is here." for number in range(20))
    found, _ = finish(explain(models, Limits(sentences=5), asked(documents=[document], model="Tiny"), 0))
    assert len(found.sentences) == 5 and found.left_out == 15
    with pytest.raises(RefusedError, match="no document 3"):
        finish(explain(models, Limits(), asked(), 3))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("The sea rises. Then it falls!", ["The sea rises.", "Then it falls!"]),
        ("海面上升了半米。后来又慢慢退下去了！", ["海面上升了半米。", "后来又慢慢退下去了！"]),
        ("潮が満ちてきました。そして引きました。", ["潮が満ちてきました。", "そして引きました。"]),
        ("바닷물이 차오른다. 그리고 빠진다.", ["바닷물이 차오른다.", "그리고 빠진다."]),
        ("Море поднимается. Потом оно уходит.", ["Море поднимается.", "Потом оно уходит."]),
        ("One line\nAnother line", ["One line", "Another line"]),
        ("Mr. Smith left early.", ["Mr. Smith left early."]),
        ("", []),
    ],
)
def test_sentences_of_many_languages(text, parts):
    assert split_sentences(text) == parts


def test_a_model_beside_itself_changes_nothing(models, limits, asked):
    found, _ = finish(compare(models, limits, asked(), "Tiny", "Tiny"))
    assert found.agreement == 1 and all(a.index == b.index and b.change == 0 for a, b in found.rows)


def test_two_orders_side_by_side_say_who_moved_where(models, limits, asked):
    documents = [*DOCUMENTS, "A tide table.", "High water."]
    found, _ = finish(compare(models, limits, asked(documents=documents), BM25, "Tiny"))
    assert (found.left, found.right) == (BM25, "Tiny")
    left, right = ([cell.index for cell in side] for side in zip(*found.rows, strict=True))
    assert right == [row["index"] for row in models.ranker("Tiny")(QUERY, documents)]
    assert [cell.change for _, cell in found.rows] == [left.index(i) - place for place, i in enumerate(right)]
    pairs = [(a, b) for i, a in enumerate(right) for b in right[i + 1 :]]
    assert found.agreement == sum(left.index(a) < left.index(b) for a, b in pairs) / len(pairs)
    with pytest.raises(RefusedError, match="no such model"):
        finish(compare(models, limits, asked(), "evil/repo", "Tiny"))


def test_a_ranking_brings_its_first_stage_along(models, limits, asked):
    ranked, _ = finish(rank(models, limits, asked(model="Tiny")))
    found = first_stage_beside(ranked)
    compared, _ = finish(compare(models, limits, asked(), BM25, "Tiny"))
    assert [[c.index for c in row] for row in found.rows] == [[c.index for c in row] for row in compared.rows]


def test_twenty_documents_take_well_under_the_limit(models, limits, asked):
    start = time.monotonic()
    ranked, _ = finish(rank(models, limits, asked(documents=DOCUMENTS * 6, model="Nano")))
    assert 0 < ranked.seconds <= time.monotonic() - start


def test_the_models_are_pipelines_of_the_installed_code(models):
    assert type(models.ranker("Nano")) is TextRankingPipeline
    assert models.ranker("Nano") is models.ranker("Nano")
