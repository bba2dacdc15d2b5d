import random
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from recipes.score import ScoreArguments, cut_passages, draw, load_pool, main
from tests.models_for_tests import tokenizer_of
from tests.recipes.folders_for_tests import SUBJECTS, small_set, tiny_retriever, write_beir


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 16), st.integers())
def test_draw_takes_every_filled_bin_before_any_twice(labels, count, bins, seed):
    labels = np.array(labels)
    drawn = draw(labels, count, bins, random.Random(seed))
    assert len(drawn) == len(set(drawn)) == min(count, len(labels))

    def bin_of(index):
        return min(int(labels[index] * bins), bins - 1)

    size, taken = Counter(map(bin_of, range(len(labels)))), Counter(map(bin_of, drawn))
    # Round after round: a bin has one fewer than another only when it is empty, or the last round ended before it.
    fullest = max(taken.values())
    assert all(taken[b] >= min(size[b], fullest - 1) for b in size)


def test_passages_cover_their_text_and_keep_to_the_limit():
    tokenizer = tokenizer_of("bert")
    text = " ".join(f"the {s} is oiled" for s in SUBJECTS)
    (parts,) = cut_passages(tokenizer, [text], 10, 100)
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")
    assert all(len(tokenizer(part, add_special_tokens=False)["input_ids"]) <= 11 for part in parts)
    assert cut_passages(tokenizer, ["", text], 10, 2)[0] == [""]
    assert len(cut_passages(tokenizer, [text], 10, 2)[0]) == 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    tiny_retriever(folder / "teacher")
    small_set(folder / "en")
    german = {f"d{i}": f"Ein {s} bleibt trocken, ein neuer {s} wird geölt." for i, s in enumerate(SUBJECTS[:6])}
    asked = {"q0": "wie pflege ich ein bread", "q1": "Symbol", "q2": "symbol"}
    write_beir(folder / "de", german, asked, {"q0": {"d0": 1}, "q1": {"d1": 1}, "q2": {"d2": 1}})
    return folder


def arguments(made, output, **changes):
    target = {"folders": [str(made / "en"), str(made / "de")], "crops": 4}
    return ScoreArguments(
        output=str(output), targets={"care": target}, teacher=str(made / "teacher"), top_k=12, candidates=5, **changes
    )


def test_a_heading_that_stands_twice_is_no_query_and_crops_hide_their_source(made, tmp_path):
    args = arguments(made, tmp_path / "x.parquet")
    pool = load_pool(args.targets["care"], tokenizer_of("bert"), args, random.Random(0))
    assert "wie pflege ich ein bread" in pool.queries
    assert not {"Symbol", "symbol"} & set(pool.queries)
    crops = [i for i, positives in enumerate(pool.positives) if not positives]
    assert len(crops) == 4
    for i in crops:
        (source,) = pool.excluded[i]
        assert any(pool.queries[i] in p for p, d in zip(pool.passages, pool.documents, strict=True) if d == source)


def test_labels_follow_the_stated_rule_and_twins_are_no_negatives(made, tmp_path):
    out = tmp_path / "scored.parquet"
    main(arguments(made, out))
    rows = list(load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path)))
    teacher = SentenceTransformer(str(made / "teacher"), model_kwargs={"dtype": "bfloat16"})
    asked = [row for row in rows if any(row["relevant"])]
    assert len(asked) == len(SUBJECTS) + 1 and len(rows) == len(asked) + 4
    for row in rows:
        similarity = teacher.encode(row["documents"]) @ teacher.encode(row["query"])
        assert row["scores"] == pytest.approx(similarity.tolist(), abs=2e-2)  # bf16, in another batch
        assert all(0 <= label <= 1 for label in row["labels"])
        # label = 0.6 * a + b * score + 0.4 * relevant with one (a, b) per query: two candidates fix it for the others
        plain = [y - 0.4 * r for y, r in zip(row["labels"], row["relevant"], strict=True)]
        slope, offset = np.polyfit(row["scores"], plain, 1)
        assert np.allclose(np.polyval([slope, offset], row["scores"]), plain, atol=5e-2) and slope > 0
    for row in asked:
        subject = row["query"].split()[-1]
        assert row["relevant"] == [True] + [False] * (len(row["documents"]) - 1)
        assert subject in row["documents"][0]
        assert not any(subject in document for document in row["documents"][1:])  # neither itself nor its twin


def test_the_same_seed_gives_the_same_rows_and_a_finished_file_stays(made, tmp_path, capsys):
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    main(arguments(made, a))
    main(arguments(made, b))
    assert a.read_bytes() == b.read_bytes()
    stamp = a.stat().st_mtime_ns
    main(arguments(made, a))
    assert a.stat().st_mtime_ns == stamp and "is there already" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]
