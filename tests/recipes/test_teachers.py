import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, pipeline

import recipes.lib.teachers
from recipes.lib.retrieval import build_index, encoding_dtype
from recipes.lib.targets import write_passages
from recipes.lib.teachers import Teacher, kind_of, load_teacher, mean_minmax, read_teachers
from tests.models_for_tests import folder_of, tiny_config, tokenizer_of
from tests.recipes.folders_for_tests import SUBJECTS, tiny_backbone, tiny_retriever

TEXTS = [f"A {a} is kept dry, a {b} is oiled once a year." for a in SUBJECTS[:5] for b in SUBJECTS[5:9]]
QUERIES = ["how do I look after a lemon", "oil for the glacier", "tide"]
ROWS = [[3, 0, 19, 7], [], [5, 5, 12]]


class ScoreServer(ThreadingHTTPServer):
    """vLLM's score API on loopback. The score of a text is its length; the first `failures` requests get `status`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ScoreHandler)
        self.asked: list[dict] = []
        self.failures, self.status, self.lost = 0, 503, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class ScoreHandler(BaseHTTPRequestHandler):
    server: ScoreServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, **body})
        scores = [{"index": i, "score": float(len(text))} for i, text in enumerate(body["text_2"])]
        status, answer = 200, {"data": scores[::-1][self.server.lost :]}  # in any order
        if self.server.failures:
            self.server.failures -= 1
            status, answer = self.server.status, {"error": "no such model"}
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ScoreServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    rows = [{"text": text, "document": f"d{i}", "folder": 0} for i, text in enumerate(TEXTS)]
    return write_passages(rows, tmp_path_factory.mktemp("passages") / "passages.arrow")


def cross_encoder(folder):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config("bert", num_labels=1))
    torch.nn.init.normal_(model.classifier.weight)  # scores that differ clearly
    model.save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def test_kinds_are_told_by_their_files(tmp_path):
    assert kind_of(str(tiny_retriever(tmp_path / "bi")), None) == "bi-encoder"
    plain = cross_encoder(tmp_path / "plain")
    assert kind_of(str(plain), None) == "cross-encoder"
    CrossEncoder(str(plain)).save_pretrained(str(tmp_path / "saved"))
    assert kind_of(str(tmp_path / "saved"), None) == "cross-encoder"
    assert kind_of(str(folder_of("bert")), None) == kind_of(str(folder_of("qwen3")), None) == "querit"
    with pytest.raises(ValueError, match="say what it is with `kind"):
        kind_of(str(tiny_backbone(tmp_path / "backbone")), None)


def test_a_bi_encoder_scores_with_the_vectors_of_its_index(passages, tmp_path):
    model = tiny_retriever(tmp_path / "model")
    index = build_index(TEXTS, str(model), tmp_path / "index")
    (teacher,) = read_teachers([{"model": str(model)}])
    found = load_teacher(teacher, index, 8)(QUERIES, ROWS, passages)
    encoder = SentenceTransformer(str(model))
    expected = encoder.encode_query(QUERIES) @ encoder.encode_document(TEXTS).T
    for query, rows in enumerate(ROWS):
        assert found[query] == pytest.approx(expected[query][rows], abs=2e-2)  # bf16 where the CPU has it


def test_bm25_teaches_with_the_scores_that_it_finds_by(passages, tmp_path):
    index = build_index(TEXTS, "bm25", tmp_path / "index", tokenizer=str(folder_of("bert")))
    (teacher,) = read_teachers([{"model": "bm25"}])
    found = load_teacher(teacher, index, 8)(QUERIES, ROWS, passages)
    scores, rows = index.search(QUERIES, len(TEXTS))
    for query, chosen in enumerate(ROWS):
        by_row = dict(zip(rows[query].tolist(), scores[query].tolist(), strict=True))
        assert found[query] == pytest.approx([by_row[row] for row in chosen])
    assert len(set(found[0].tolist())) > 1


def test_a_cross_encoder_scores_as_its_own_class(passages, tmp_path):
    folder = cross_encoder(tmp_path / "model")
    (teacher,) = read_teachers([{"model": str(folder)}])
    found = load_teacher(teacher, None, 2)(QUERIES, ROWS, passages)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer_of("bert")
    for query, rows, scores in zip(QUERIES, ROWS, found, strict=True):
        assert len(scores) == len(rows)
        for row, score in zip(rows, scores, strict=True):
            with torch.no_grad():
                logit = model(**tokenizer(query, TEXTS[row], return_tensors="pt")).logits
            assert score == pytest.approx(logit.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_querit_folder_scores_as_its_pipeline(kind, passages):
    (teacher,) = read_teachers([{"model": str(folder_of(kind))}])
    found = load_teacher(teacher, None, 8)(QUERIES, ROWS, passages)
    ranker = pipeline("text-ranking", model=str(folder_of(kind)), dtype=encoding_dtype(), trust_remote_code=True)
    for query, rows, scores in zip(QUERIES, ROWS, found, strict=True):
        ranked = ranker(query, [TEXTS[row] for row in rows]) if rows else []
        expected = {result["index"]: result["score"] for result in ranked}
        # The teacher's are logits; in bf16, in other batches.
        assert np.tanh(scores / 2) == pytest.approx([expected[i] for i in range(len(rows))], abs=2e-2)


def test_a_served_model_is_asked_as_vllm_wants_and_overload_is_waited_for(passages, server):
    teachers = read_teachers([{"model": "some/reranker", "url": f"{server.url}/", "revision": "abc"}])
    assert teachers[0].kind == "vllm"
    server.failures = 2
    found = load_teacher(teachers[0], None, 8)(QUERIES, ROWS, passages)
    assert [scores.tolist() for scores in found] == [[len(TEXTS[row]) for row in rows] for rows in ROWS]
    expected = {"path": "/score", "model": "some/reranker", "text_1": QUERIES[2], "text_2": [TEXTS[r] for r in ROWS[2]]}
    assert expected in server.asked
    assert len(server.asked) == 2 + 2  # two refused, two answered; a query without passages asks nothing


def test_a_server_that_fails_stops_the_stage_and_says_what_to_do(passages, server, monkeypatch):
    monkeypatch.setattr(recipes.lib.teachers, "RETRIES", 1)
    score = load_teacher(Teacher("m", kind="vllm", url=server.url), None, 8)
    server.lost = 1
    with pytest.raises(RuntimeError, match="gave 3 scores for 4 passages"):
        score(QUERIES, ROWS, passages)
    server.lost, server.failures, server.status = 0, 9, 404
    with pytest.raises(RuntimeError, match=r"status 404, .*no such model"):
        score(QUERIES, ROWS, passages)
    server.failures, server.status = 9, 500
    with pytest.raises(RuntimeError, match="vllm serve m"):
        score(QUERIES, ROWS, passages)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "teachers is empty"),
        ([{"modle": "x"}], r"teachers\[0\] must be a mapping"),
        ([{"model": "x", "weights": 2}], r"teachers\[0\] must be a mapping"),
        (["x"], r"teachers\[0\] must be a mapping"),
        ([{"model": "x", "url": "localhost:8000"}], "must start with http"),
        ([{"model": "x", "kind": "vllm"}], "vllm goes with a url"),
        ([{"model": "x", "kind": "oracle"}], "kind is one of"),
    ],
)
def test_what_is_no_teacher_is_refused(entries, told):
    with pytest.raises(ValueError, match=told):
        read_teachers(entries)


def test_the_key_follows_the_weights_and_not_the_server(tmp_path):
    teacher = Teacher(str(tiny_retriever(tmp_path / "model")), kind="bi-encoder")
    before = teacher.key()
    assert before == teacher.key()
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert teacher.key() != before
    assert Teacher("m", url="http://a", kind="vllm").key() == Teacher("m", url="http://b", kind="vllm").key()


@given(
    arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(-50, 50)),
    st.floats(0.1, 10),
    st.floats(-9, 9),
)
def test_each_teacher_counts_alike_whatever_its_measure(scores, scale, offset):
    together = mean_minmax(scores)
    assert ((together >= 0) & (together <= 1)).all()
    moved = scores.copy()
    moved[0] = scale * moved[0] + offset
    assert np.allclose(mean_minmax(moved), together)
    by_hand = [[(s - min(row)) / ((max(row) - min(row)) or 1) for s in row] for row in scores.tolist()]
    assert np.allclose(together, np.mean(by_hand, axis=0))
