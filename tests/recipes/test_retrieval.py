import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

import recipes.lib.retrieval
from recipes.lib.retrieval import build_index, load_index
from tests.models_for_tests import tokenizer_of
from tests.recipes.folders_for_tests import SUBJECTS, tiny_backbone, tiny_retriever

PASSAGES = [f"a {a} is kept by the {b} and oiled, 雨天の{b}" for a in SUBJECTS for b in SUBJECTS[:5]]
QUERIES = [f"how do I look after a {subject}" for subject in SUBJECTS[:6]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_retriever(tmp_path_factory.mktemp("retrieval") / "model")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(recipes.lib.retrieval, "SHARD_SIZE", 16)
    monkeypatch.setattr(recipes.lib.retrieval, "BLOCK_BYTES", 24 * 4 * 48)  # no divisor of the passages' number


def expected(model, top_k, **options):
    encoder = SentenceTransformer(str(model), **options)
    similarity = encoder.encode_query(QUERIES) @ encoder.encode_document(PASSAGES).T
    return similarity, -np.sort(-similarity, axis=1)[:, :top_k]


def test_dense_search_is_exact_over_blocks_and_shards(model, tmp_path, small_blocks):
    index = build_index(iter(PASSAGES), str(model), tmp_path / "index")
    scores, rows = index.search(QUERIES, 30)
    assert scores.dtype == np.float32 and rows.dtype == np.int64 and scores.shape == rows.shape == (6, 30)
    similarity, best = expected(model, 30)
    # In bf16 on CPUs that have it: scores agree to its rounding, and every row has the score that is told for it.
    assert np.allclose(scores, best, atol=2e-2)
    assert np.allclose(scores, np.take_along_axis(similarity, rows, 1), atol=2e-2)
    assert (np.diff(scores, axis=1) <= 0).all() and all(len(set(row)) == 30 for row in rows.tolist())
    again = load_index(tmp_path / "index")
    assert len(again) == len(PASSAGES)
    assert all(np.array_equal(a, b) for a, b in zip(again.search(QUERIES, 30), (scores, rows), strict=True))
    asked = again.encode_queries(QUERIES)
    assert np.allclose(again.scores(asked[2], rows[2].tolist()), scores[2], atol=1e-6)
    # What was encoded last is kept; other queries, and those of a list that was changed, are encoded.
    some = QUERIES[:2]
    assert np.allclose(again.encode_queries(some), asked[:2], atol=2e-2)
    some[0] = QUERIES[2]
    assert np.allclose(again.encode_queries(some)[0], asked[2], atol=2e-2)
    # Nothing but the index is left, and fewer passages than top_k give fewer columns.
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["index.json", "vectors.npy"]
    assert again.search(QUERIES[:1], 1000)[1].shape == (1, len(PASSAGES))


def test_the_index_follows_the_models_own_prompts_and_similarity(tmp_path):
    transformer = modules.Transformer(str(tiny_backbone(tmp_path / "backbone")), max_seq_length=64)
    stack = [transformer, modules.Pooling(transformer.get_embedding_dimension(), "mean")]  # vectors of any length
    prompts = {"query": "query: ", "document": "passage: "}
    for similarity in ("cosine", "dot"):
        folder = tmp_path / similarity
        encoder = SentenceTransformer(modules=stack, prompts=prompts, similarity_fn_name=similarity, device="cpu")
        encoder.save(str(folder))
        scores, rows = build_index(PASSAGES, str(folder), tmp_path / f"{similarity}-index").search(QUERIES, 5)
        pairs = encoder.similarity(encoder.encode_query(QUERIES), encoder.encode_document(PASSAGES)).numpy()
        assert np.allclose(scores, np.take_along_axis(pairs, rows, 1), rtol=2e-2, atol=2e-2)


def bm25_by_hand(query, k1=1.5, b=0.75):
    """sum over the query's pieces of ln(1 + (N - df + 0.5) / (df + 0.5)) tf / (tf + k1 (1 - b + b length / mean))."""

    def pieces(text):
        return tokenizer_of("bert")(text.lower(), add_special_tokens=False)["input_ids"]

    documents = [Counter(pieces(text)) for text in PASSAGES]
    lengths = np.array([counts.total() for counts in documents])
    scores = np.zeros(len(PASSAGES))
    for piece in pieces(query):
        tf = np.array([counts[piece] for counts in documents])
        df = (tf > 0).sum()
        idf = np.log(1 + (len(PASSAGES) - df + 0.5) / (df + 0.5))
        scores += idf * tf / (tf + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def test_bm25_counts_word_pieces_in_every_script(model, tmp_path):
    index = build_index(iter(PASSAGES), "bm25", tmp_path / "index", tokenizer=str(model))
    scores, rows = load_index(tmp_path / "index").search([*QUERIES, "雨", "", "the"], 7)
    assert scores.shape == rows.shape == (9, 7)
    for text, found, best in zip([*QUERIES, "雨"], scores, rows, strict=False):
        by_hand = bm25_by_hand(text)
        assert found == pytest.approx(-np.sort(-by_hand)[:7], rel=1e-4)
        assert found == pytest.approx(by_hand[best], rel=1e-4)
    assert all("雨" in PASSAGES[row] for row in rows[6])
    assert scores[7].tolist() == [0.0] * 7  # an empty query finds nothing
    assert index.search(QUERIES[:1], 1000)[1].shape == (1, len(PASSAGES))
    with pytest.raises(ValueError, match="give tokenizer"):
        build_index(PASSAGES, "bm25", tmp_path / "other")


def test_a_finished_index_stays_and_other_passages_make_another(model, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    build_index(PASSAGES, str(model), folder)
    stamp = (folder / "vectors.npy").stat().st_mtime_ns
    build_index(PASSAGES, str(model), folder)
    assert (folder / "vectors.npy").stat().st_mtime_ns == stamp
    assert len(build_index(PASSAGES[:9], str(model), folder)) == 9
    assert np.load(folder / "vectors.npy").shape[0] == 9
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="run build_index again"):
        load_index(folder)
    with pytest.raises(ValueError, match="no passages"):
        build_index([], str(model), folder)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import recipes.lib.retrieval as retrieval
    from tests.recipes.test_retrieval import PASSAGES

    retrieval.SHARD_SIZE = 16
    class Dying(retrieval.Encode):
        def __call__(self, rows):
            if len(list(Path(sys.argv[2]).glob("shards/shard-*.parquet"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(rows)
    retrieval.Encode = Dying
    retrieval.build_index(PASSAGES, sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_build_goes_on_to_the_same_bytes(model, tmp_path, small_blocks):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(model), str(tmp_path / "killed")]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env={**os.environ}, check=False)
    assert run.returncode == -signal.SIGKILL
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "shards").glob("shard-*.parquet")}
    assert len(stamps) == 2 and not (tmp_path / "killed" / "index.json").exists()
    encoded = []

    class Counting(recipes.lib.retrieval.Encode):
        def __call__(self, rows):
            encoded.extend(rows)
            return super().__call__(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes.lib.retrieval, "Encode", Counting)
        build_index(PASSAGES, str(model), tmp_path / "killed")
    assert len(encoded) == len(PASSAGES) - 2 * 16
    build_index(PASSAGES, str(model), tmp_path / "unbroken")
    for name in ("vectors.npy", "index.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert json.loads((tmp_path / "killed" / "index.json").read_text())["passages"] == len(PASSAGES)
