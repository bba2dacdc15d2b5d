import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from trl import TrlParser

from recipes.lib import retrieval, targets
from recipes.lib.data import read_corpus
from recipes.lib.shards import read_rows
from recipes.lib.targets import QUERIES, Passages, cut_passages, prepare, read_target, sample_ids
from recipes.lib.teachers import Teacher, read_teachers
from recipes.score import ScoreArguments, draw, first_stage, main, score_target
from tests.models_for_tests import folder_of, tokenizer_of
from tests.recipes.folders_for_tests import SUBJECTS, small_set, tiny_backbone, tiny_retriever, write_beir
from tests.recipes.test_shards import local_ray  # noqa: F401
from tests.recipes.test_teachers import server  # noqa: F401

ROOT = Path(__file__).parents[2]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 16), st.integers(1, 5),
    st.integers(),
)  # fmt: skip
def test_draw_takes_every_filled_bin_before_any_twice(labels, count, bins, per_bin, seed):
    labels = np.array(labels)
    drawn = draw(labels, count, bins, per_bin, random.Random(seed))

    def bin_of(index):
        return min(int(labels[index] * bins), bins - 1)

    size, taken = Counter(map(bin_of, range(len(labels)))), Counter(map(bin_of, drawn))
    size = {b: min(per_bin, members) for b, members in size.items()}
    assert len(drawn) == len(set(drawn)) == min(count, sum(size.values()))
    # Round after round: a bin has one fewer than another only when it is empty, or the last round ended before it.
    fullest = max(taken.values())
    assert all(min(size[b], fullest - 1) <= taken[b] <= size[b] for b in size)


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


def target_of(made, **changes):
    return {"folders": [str(made / "en"), str(made / "de")], "crops": 4, **changes}


def arguments(made, output, target=None, **changes):
    options = {"teachers": [{"model": str(made / "teacher")}], "top_k": 12, "candidates": 5, "shard_size": 8, **changes}
    return ScoreArguments(output=str(output), targets={"care": target or target_of(made)}, **options)


def scored(args):
    main(args)
    return read_output(args.output)


def read_output(path):
    data = load_dataset("parquet", data_files=str(path), split="train", cache_dir=f"{path}.cache")
    return list(data)


def prepared(target, folder, seed=0):
    prepare("care", read_target("care", target), tokenizer_of("bert"), folder, 112, 3, seed, 8)
    return Passages(folder / "passages.arrow"), pq.read_table(folder / "queries.parquet", schema=QUERIES).to_pylist()


def test_a_heading_that_stands_twice_is_no_query_and_crops_hide_their_source(made, tmp_path):
    passages, items = prepared(target_of(made), tmp_path)
    texts, documents = list(passages.column("text")), list(passages.column("document"))
    assert len(passages) == len(SUBJECTS) + 6 and [passages.text(row) for row in range(len(passages))] == texts
    queries = [item["query"] for item in items]
    assert "wie pflege ich ein bread" in queries and not {"Symbol", "symbol"} & set(queries)
    assert len(queries) == len(SUBJECTS) + 1 + 4
    for item in items:
        own = {documents[row] for row in item["hidden"]}
        assert len(own) == 1 and sorted(item["hidden"]) == [row for row, of in enumerate(documents) if of in own]
        if item["id"].startswith("crop-"):
            assert item["answers"] == [] and any(item["query"] in texts[row] for row in item["hidden"])
        else:
            assert item["answers"] == item["hidden"]


def test_across_languages_the_positive_stands_in_another_folder(made, tmp_path):
    passages, items = prepared(target_of(made, cross_lingual=True, crops=30), tmp_path)
    folders = list(passages.column("folder"))
    for item in items:
        own = [row for row in item["hidden"] if row not in item["answers"]]
        assert len({folders[row] for row in own}) == 1  # that of the query
        assert {folders[row] for row in item["answers"]} & {folders[row] for row in own} == set()
    assert any(item["answers"] for item in items if item["id"].startswith("crop-"))
    for row in scored(arguments(made, tmp_path / "x.parquet", target_of(made, cross_lingual=True))):
        if row["query"].startswith("how do I"):
            positive = [text for text, known in zip(row["documents"], row["relevant"], strict=True) if known]
            assert all(text.startswith("Ein ") for text in positive)


def test_choices_depend_on_what_is_chosen_not_on_its_place(made, tmp_path):
    limits = {"documents": 5, "queries": 4, "crops": 0}
    target = target_of(made, **limits)
    kept = sample_ids(read_target("care", target), "0 care")
    passages, items = prepared(target, tmp_path / "a")
    # A document is in or out in all its languages.
    assert len(kept) == 5 and set(passages.column("document")) == kept
    assert len(passages) == sum(len(kept & set(read_corpus(made / name))) for name in ("en", "de"))
    assert 1 <= len(items) <= 4 and all(item["answers"] for item in items)
    for name in ("en", "de"):  # the same lines in another order
        (tmp_path / name / "qrels").mkdir(parents=True)
        for file in ("corpus.jsonl", "queries.jsonl"):
            lines = (made / name / file).read_text(encoding="utf-8").splitlines(keepends=True)
            (tmp_path / name / file).write_text("".join(lines[::-1]), encoding="utf-8")
        (tmp_path / name / "qrels" / "test.tsv").write_bytes((made / name / "qrels" / "test.tsv").read_bytes())
    reversed_target = {"folders": [str(tmp_path / "de"), str(tmp_path / "en")], **limits}
    assert sample_ids(read_target("care", reversed_target), "0 care") == kept
    _, others = prepared(reversed_target, tmp_path / "b")
    assert [item["query"] for item in others] == [item["query"] for item in items]
    assert sample_ids(read_target("care", target), "1 care") != kept


def test_a_mined_folder_is_read_by_its_split(made, tmp_path):
    folder = small_set(tmp_path / "mined")
    header, *lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "qrels" / "train.tsv").write_text(header + "".join(lines[:10]), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(header + "".join(lines[10:]), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="name the split"):
        prepared({"folders": [str(folder)]}, tmp_path / "none")
    for split, count in (("train", 10), ("test", 6)):
        _, items = prepared({"folders": [str(folder)], "split": split}, tmp_path / split)
        assert len(items) == count


def test_files_of_two_configs_are_not_taken_for_one(made, tmp_path, monkeypatch):
    target = target_of(made, crops=0)
    whole = prepared(target, tmp_path)[1]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(targets, "queries_of", killed)  # the passages are written by then
        with pytest.raises(KeyboardInterrupt):
            prepared({**target, "documents": 4}, tmp_path)
    passages, items = prepared(target, tmp_path)
    assert len(passages) == len(SUBJECTS) + 6 and items == whole


def test_documents_that_are_asked_for_come_into_the_pool_first(tmp_path):
    folder = small_set(tmp_path / "mined")
    header, *lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "qrels" / "test.tsv").write_text(header + "".join(lines[3:6]), encoding="utf-8")
    asked = {"d3", "d4", "d5"}
    for seed in range(5):
        assert sample_ids(read_target("care", {"folders": [str(folder)], "documents": 4}), f"{seed}") > asked
        assert sample_ids(read_target("care", {"folders": [str(folder)], "documents": 2}), f"{seed}") < asked


def test_labels_follow_the_stated_rule_and_twins_are_no_negatives(made, tmp_path):
    rows = scored(arguments(made, tmp_path / "scored.parquet"))
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


def test_bm25_finds_candidates_and_a_served_model_labels_them(made, tmp_path, server):  # noqa: F811
    args = arguments(
        made, tmp_path / "x.parquet", target_of(made, crops=0), retriever="bm25", tokenizer=str(made / "teacher"),
        teachers=[{"model": "length", "url": server.url}], relevance_weight=0.25, top_k=8, candidates=8, per_bin=8,
    )  # fmt: skip
    rows = scored(args)
    assert len(rows) == len(SUBJECTS) + 1
    for row in rows:  # all that were retrieved are kept, so that every label can be computed anew
        lengths = np.array([len(document) for document in row["documents"]])
        assert row["scores"] == lengths.tolist() and len(lengths) == 9
        minmax = (lengths - lengths.min()) / max(1, np.ptp(lengths))
        assert row["labels"] == pytest.approx(0.75 * minmax + 0.25 * np.array(row["relevant"]), abs=1e-4)
    before = len(server.asked)
    main(args)
    assert len(server.asked) == before


def test_several_teachers_are_averaged_on_one_scale(made, tmp_path, server):  # noqa: F811
    both = [{"model": str(made / "teacher")}, {"model": "length", "url": server.url}, {"model": str(folder_of("bert"))}]
    options = {"top_k": 6, "candidates": 6, "per_bin": 6, "relevance_weight": 0.4}
    alone = [
        {row["query"]: row for row in scored(arguments(made, tmp_path / f"{n}.parquet", **options, **extra))}
        for n, extra in enumerate(
            [{"teachers": [t], "retriever": str(made / "teacher")} for t in both] + [{"teachers": both}]
        )
    ]
    compared = 0
    for query, row in alone[3].items():
        per_teacher = [dict(zip(one[query]["documents"], one[query]["scores"], strict=True)) for one in alone[:3]]
        if any(set(scores) != set(row["documents"]) for scores in per_teacher):
            continue  # another twin was drawn as the positive
        minmax = []
        for scores in per_teacher:
            values = np.array([scores[document] for document in row["documents"]])
            minmax.append((values - values.min()) / (np.ptp(values) or 1))
        assert row["scores"] == pytest.approx(np.mean(minmax, axis=0), abs=2e-2)  # of scores rounded to 4 digits
        expected = 0.6 * np.mean(minmax, axis=0) + 0.4 * np.array(row["relevant"])
        assert row["labels"] == pytest.approx(expected, abs=2e-2)
        compared += 1
    assert compared >= 10


def test_a_teacher_that_is_the_retriever_is_loaded_once_and_encodes_a_query_once(made, tmp_path, monkeypatch):
    encode, asked = retrieval.encode, []

    def noted(encoder, texts, batch_size, queries=False):
        if queries:
            asked.append((encoder, texts))
        return encode(encoder, texts, batch_size, queries)

    monkeypatch.setattr(retrieval, "encode", noted)
    rows = scored(arguments(made, tmp_path / "x.parquet"))
    texts = [query for _, queries in asked for query in queries]
    assert {row["query"] for row in rows} <= set(texts) and len(texts) == len(SUBJECTS) + 1 + 4
    assert len({id(encoder) for encoder, _ in asked}) == 1 and len(asked) == 3  # shards of 8


def test_hard_labels_and_the_hardest_candidates_for_comparison(made, tmp_path):
    plain = scored(arguments(made, tmp_path / "bins.parquet", top_k=14, candidates=14, per_bin=14))
    hard = scored(
        arguments(made, tmp_path / "hard.parquet", top_k=14, candidates=3, selection="hardest", labels="hard")
    )
    every = {row["query"]: row for row in plain}
    assert len(hard) == len(SUBJECTS) + 1 < len(plain)  # without a known positive hard labels say nothing
    for row in hard:
        assert row["labels"] == [1.0, 0.0, 0.0, 0.0] and row["relevant"] == [True, False, False, False]
        whole = every[row["query"]]
        best = sorted(s for s, r in zip(whole["scores"], whole["relevant"], strict=True) if not r)[-3:]
        assert sorted(row["scores"][1:]) == pytest.approx(best, abs=1e-3)


def test_the_same_seed_gives_the_same_rows_and_a_finished_file_stays(made, tmp_path, capsys):
    a, b, c = (tmp_path / f"{name}.parquet" for name in "abc")
    main(arguments(made, a))
    main(arguments(made, b))
    assert a.read_bytes() == b.read_bytes()
    stamp = a.stat().st_mtime_ns
    main(arguments(made, a))
    assert a.stat().st_mtime_ns == stamp and "is there already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"a\.parquet is there .* made with other settings \(seed\)"):
        main(arguments(made, a, seed=1))
    with pytest.raises(FileExistsError, match=r"other settings \(teachers\)"):
        main(arguments(made, a, teachers=[{"model": str(made / "teacher"), "url": "http://a"}]))
    assert a.stat().st_mtime_ns == stamp
    main(arguments(made, c, seed=1))
    assert c.read_bytes() != a.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "c.parquet"]


def test_a_killed_stage_goes_on_to_the_same_bytes(made, tmp_path):
    target = target_of(made, crops=150)
    config = {"targets": {"care": target}, "teachers": [{"model": str(made / "teacher")}], "top_k": 12, "shard_size": 1}
    path, out = tmp_path / "config.yaml", tmp_path / "killed.parquet"
    path.write_text(yaml.safe_dump({**config, "output": str(out)}), encoding="utf-8")
    command = [sys.executable, "-m", "recipes.score", "--config", str(path)]
    process = subprocess.Popen(command, cwd=ROOT)
    shards = tmp_path / "killed.parquet.work" / "care" / "scored"
    manifest = shards / "manifest.json"
    while not manifest.exists() or not json.loads(manifest.read_text())["shards"]:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = {e["shard"]: (shards / f"shard-{e['shard']:05d}.parquet").stat().st_mtime_ns for e in
                json.loads(manifest.read_text())["shards"]}  # fmt: skip
    assert 1 <= len(finished) < 150 and not out.exists()
    with pytest.raises(ValueError, match="not complete"):
        list(read_rows(shards))

    # What was finished is not made again ...
    args = ScoreArguments(output=str(out), **config)
    score_target("care", read_target("care", target), shards.parent, read_teachers(args.teachers), args)
    stamps = {shard: (shards / f"shard-{shard:05d}.parquet").stat().st_mtime_ns for shard in finished}
    assert stamps == finished
    # ... and the whole is what an unbroken run gives.
    main(ScoreArguments(output=str(out), **config))
    main(ScoreArguments(output=str(tmp_path / "unbroken.parquet"), **config))
    assert out.read_bytes() == (tmp_path / "unbroken.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "killed.parquet", "unbroken.parquet"]


def test_ray_gives_the_same_rows(made, tmp_path, local_ray):  # noqa: F811
    main(arguments(made, tmp_path / "local.parquet"))
    main(arguments(made, tmp_path / "ray.parquet", engine="ray", workers=2))
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


def test_the_first_stage_is_told_by_the_teachers_or_the_config():
    dense, pairs = Teacher("owner/e", "c0ffee", "bi-encoder", trust_remote_code=True), Teacher("r", kind="querit")
    args = ScoreArguments(output="x", targets={}, teachers=[])
    first = first_stage(args, [dense, pairs])
    assert (first.retriever, first.revision, first.tokenizer, first.tokenizer_revision) == (
        "owner/e", "c0ffee", "owner/e", "c0ffee",
    )  # fmt: skip
    assert first.trust_remote_code
    with pytest.raises(ValueError, match="give retriever"):
        first_stage(args, [pairs])
    args = ScoreArguments(output="x", targets={}, teachers=[], retriever="other", retriever_revision="abc")
    first = first_stage(args, [pairs, dense])
    assert (first.revision, first.tokenizer, first.tokenizer_revision) == ("abc", "other", "abc")
    assert not first.trust_remote_code
    args = ScoreArguments(output="x", targets={}, teachers=[], retriever="bm25")
    assert first_stage(args, [dense]).tokenizer == "owner/e"
    with pytest.raises(ValueError, match="give tokenizer"):
        first_stage(args, [Teacher("m", kind="vllm", url="http://a")])
    args = ScoreArguments(
        output="x", targets={}, teachers=[], retriever="bm25", tokenizer="owner/t", tokenizer_revision="def"
    )
    assert first_stage(args, [dense]).tokenizer_revision == "def"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selection": "top"}, "selection is 'top'"),
        ({"labels": "binary"}, "labels is 'binary'"),
        ({"engine": "spark"}, "engine is 'spark'"),
        ({"per_bin": 0}, "per_bin is 0"),
        ({"relevance_weight": 1.5}, "relevance_weight is 1.5"),
        ({"target": {"folders": ["x"], "langs": 2}}, "Target care: "),
        ({"target": {"crops": 2}}, "Target care: "),
    ],
)
def test_mistakes_are_told_before_any_work(made, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        main(arguments(made, tmp_path / "x.parquet", **changes))
    assert not list(tmp_path.iterdir())


def test_nothing_to_ask_and_nothing_to_read_are_told(made, tmp_path):
    silent = write_beir(tmp_path / "silent", {"d0": "A lemon."}, {}, {})
    with pytest.raises(ValueError, match="No query has candidates"):
        main(arguments(made, tmp_path / "x.parquet", {"folders": [str(silent)]}))
    blank = write_beir(tmp_path / "blank", {"d0": " "}, {}, {})
    with pytest.raises(ValueError, match="hold no text"):
        main(arguments(made, tmp_path / "x.parquet", {"folders": [str(blank)]}))
    tiny_backbone(tmp_path / "bare")
    with pytest.raises(ValueError, match="kind: bi-encoder"):
        main(arguments(made, tmp_path / "x.parquet", teachers=[{"model": str(tmp_path / "bare")}]))


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/*score*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_targets_and_teachers_have_known_keys(path):
    (args,) = TrlParser(ScoreArguments).parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    args.check()
    assert all(read_target(name, target).folders for name, target in args.targets.items())
    assert [Teacher(**entry) for entry in args.teachers]
