import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from recipes.lib import shards
from recipes.lib.data import read_corpus, read_jsonl, read_qrels
from recipes.lib.documents import read_documents
from recipes.lib.retrieval import build_index
from recipes.mine import LAST, Lowest, MineArguments, RoundTrip, main
from tests.models_for_tests import tiny_config, tokenizer_of
from tests.recipes.folders_for_tests import SUBJECTS, tiny_retriever
from tests.recipes.test_generators import chat_tokenizer, entry_of, serve  # noqa: F401
from tests.recipes.test_shards import local_ray  # noqa: F401

ROOT = Path(__file__).parents[2]
PLACES = ["harbour", "kitchen", "garden", "workshop", "attic", "cellar"]


def document(number):
    subject, place = SUBJECTS[number % len(SUBJECTS)], PLACES[number // len(SUBJECTS) % len(PLACES)]
    text = (
        f"In the {place} an old {subject} number {number} was found under a sheet of paper. "
        f"Whoever wants a {subject} for the {place} should oil it once, and keep shelf {number} free for it."
    )
    return {"_id": f"d{number}", "title": f"The {subject} in the {place}" if number % 2 else "", "text": text}


GERMAN = [
    {"_id": f"g{n}", "title": "", "text": f"Der alte {s} steht im Keller Nummer {n} und wird im Sommer geölt."}
    for n, s in enumerate(SUBJECTS[:8])
]


def write(path, documents):
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    tokenizer_of("bert").save_pretrained(folder / "pieces")
    write(folder / "docs.jsonl", [document(n) for n in range(80)])
    write(folder / "mixed.jsonl", [*GERMAN, *(document(n) for n in range(20))])
    return folder


def arguments(made, output, **changes):
    settings = {"documents": str(made / "docs.jsonl"), "generators": [{"kind": "crop"}], "output_dir": str(output)}
    settings |= {"retriever_tokenizer": str(made / "pieces"), "shard_size": 8, "held_aside": 0.25}
    return MineArguments(**{**settings, **changes})


def contents(folder):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    settings = json.loads(files.pop("mine.json"))
    return files, {key: value for key, value in settings.items() if key != "settings"}


def test_the_output_is_a_beir_folder_judged_by_source(made, tmp_path, capsys):
    out = tmp_path / "mined"
    main(arguments(made, out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mined"]
    assert list(read_jsonl(out, "corpus")) == list(read_documents(made / "docs.jsonl"))
    queries = {row["_id"]: row for row in read_jsonl(out, "queries")}
    train, test = read_qrels(out, "train"), read_qrels(out, "test")
    assert {**train, **test} == {key: {row["document"]: 1} for key, row in queries.items()}
    assert not set(train) & set(test)
    aside = {row["document"] for key, row in queries.items() if key in test}
    assert not aside & {queries[key]["document"] for key in train} and 8 <= len(aside) <= 32
    assert {row["language"] for row in queries.values()} == {"en"}
    assert {row["kind"] for row in queries.values()} == {"title", "keywords", "sentence"}
    summary = json.loads((out / "mine.json").read_text())
    crop = summary["generators"]["crop"]
    assert crop["written"] == crop["kept"] + sum(crop["dropped"].values())
    assert crop["kept"] == len(queries) == sum(summary["queries"].values()) == sum(summary["queries_by_kind"].values())
    assert summary["documents_asked"] == 80 and "80 documents" in capsys.readouterr().out
    main(arguments(made, out, workers=2))  # of no account
    assert "is there already" in capsys.readouterr().out
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"made with other settings \(sample, seed\)\. Move it away, or name"):
        main(arguments(made, out, sample=15, seed=1))
    assert contents(out) == before


def test_what_is_asked_is_the_text_of_pages_and_of_the_column_that_is_named(made, tmp_path, capsys):
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "._x.md").write_bytes(b"\xff")
    lines = ["id;body;note"]
    for number in range(12):
        text = document(number)["text"]
        (pages / f"{number}.md").write_text(
            f"---\ntitle: Page of the {SUBJECTS[number]}\nlayout: default page\n---\n{text}\n", encoding="utf-8"
        )
        lines.append(f"{number};{text};unread words of note {number}")
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    main(arguments(made, tmp_path / "a", documents=str(pages), round_trip_top_k=0))
    assert "left out: 1 hidden" in capsys.readouterr().out
    queries = [row["text"] for row in read_jsonl(tmp_path / "a", "queries")]
    assert "Page of the bread" in queries and not any("layout" in q or "title:" in q or "---" in q for q in queries)
    main(arguments(made, tmp_path / "b", documents=str(tmp_path / "d.csv"), column="body", round_trip_top_k=0))
    queries = [row["text"] for row in read_jsonl(tmp_path / "b", "queries")]
    assert len(queries) > 12 and not any("unread" in query for query in queries)


def test_the_round_trip_is_the_retrievers_top_k(made, tmp_path):
    retriever = str(tiny_retriever(tmp_path / "retriever"))
    main(arguments(made, tmp_path / "all", round_trip_top_k=0))
    main(arguments(made, tmp_path / "top", round_trip_top_k=2, retriever=retriever))
    every, kept = ({row["text"]: row for row in read_jsonl(tmp_path / name, "queries")} for name in ("all", "top"))
    dropped = json.loads((tmp_path / "top" / "mine.json").read_text())["generators"]["crop"]["dropped"]["round_trip"]
    assert set(kept) < set(every) and len(every) - len(kept) == dropped > 0 and len(kept) > 0
    model = SentenceTransformer(retriever, device="cpu")
    corpus = read_corpus(tmp_path / "all")
    similarity = model.encode(list(every)) @ model.encode(list(corpus.values())).T
    place = {key: n for n, key in enumerate(corpus)}
    for (text, row), scores in zip(every.items(), similarity, strict=True):
        own, second = scores[place[row["document"]]], np.sort(scores)[-2]
        assert own >= second - 1e-2 if text in kept else own <= second + 1e-2  # the stage may encode in bf16


def test_each_filter_counts_what_it_drops(made, tmp_path, serve, capsys):  # noqa: F811
    own = [document(n) for n in range(4)]

    def answer(messages):
        (n,) = [n for n, d in enumerate(own) if d["text"] in messages[-1]["content"]]
        return [
            "bread in the harbour\nbread  in the Harbour!\nsomething old\nNo numbers, no explanations.",
            f"{SUBJECTS[1]} in the harbour\nsomething old\nx\nwhere is {SUBJECTS[1]} number 1",
            f"should oil it once, and keep shelf 2 free\nWo steht der alte {SUBJECTS[2]} im Sommer und im Winter?",
            "kettle " * 70 + f"\n{SUBJECTS[3]} in the harbour\nwho oils the {SUBJECTS[3]}?\nfour\nfive",
        ][n]

    server = serve(answer=answer)
    write(tmp_path / "docs.jsonl", own)
    changes = {"queries_per_document": 4, "held_aside": 0.0, "generators": [entry_of(server), {"kind": "crop"}]}
    main(arguments(made, tmp_path / "out", documents=str(tmp_path / "docs.jsonl"), **changes))
    generators = json.loads((tmp_path / "out" / "mine.json").read_text())["generators"]
    found = generators["openai:r1"]
    assert {key: n for key, n in found["dropped"].items() if n} == {
        "echo": 1, "surplus": 1, "too_short": 1, "too_long": 1, "copy": 1, "language": 1, "duplicate": 1,
        "ambiguous": 2,
    }  # fmt: skip
    assert found["written"] == 15 and found["kept"] == 6 and found["refused"] == 0
    log = capsys.readouterr().out
    assert (
        "openai:r1: 15 queries written, 6 kept; dropped: 1 echo, 1 surplus, 1 too_short, 1 too_long, 1 copy, "
        "1 language, 1 duplicate, 2 ambiguous\n"
    ) in log
    crop = generators["crop"]
    told = ", ".join(f"{n} {name}" for name, n in crop["dropped"].items() if n) or "none"
    assert f"crop: {crop['written']} queries written, {crop['kept']} kept; dropped: {told}\n" in log
    assert "refused" not in log
    queries = list(read_jsonl(tmp_path / "out", "queries"))
    assert [q["text"] for q in queries if q["generator"] == "openai:r1"] == [
        "bread in the harbour", "tide in the harbour", "where is tide number 1", "lemon in the harbour",
        "who oils the lemon?", "four",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out" / "qrels").iterdir()) == ["train.tsv"]
    assert "sk-very-secret" not in (tmp_path / "out" / "mine.json").read_text()


def test_a_query_that_brings_another_document_back_is_dropped(made, tmp_path, serve):  # noqa: F811
    def answer(messages):
        return "the glacier number" if "bread" in messages[-1]["content"] else "the bread number"

    server = serve(answer=answer)
    documents = [{"_id": s, "title": "", "text": f"A {s} number 7."} for s in ("bread", "glacier")]
    write(tmp_path / "docs.jsonl", documents)
    changes = {"documents": str(tmp_path / "docs.jsonl"), "generators": [entry_of(server)], "round_trip_top_k": 1}
    with pytest.raises(ValueError, match="No query is left"):
        main(arguments(made, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    main(arguments(made, tmp_path / "out", **{**changes, "round_trip_top_k": 2}))
    assert len(list(read_jsonl(tmp_path / "out", "queries"))) == 2
    assert len(server.requests) == 2  # the second run took the answers of the first


def test_bm25_brings_no_document_back_that_shares_no_word_piece(tmp_path):
    """Even where top_k has room for all documents."""
    documents = ["oil the bicycle", "dry the bread", "tune the violin"]
    words = ["<unk>", *sorted({word for text in documents for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "words")
    build_index(documents, "bm25", tmp_path / "index", tokenizer=str(tmp_path / "words"))
    asked = [(0, "bicycle"), (1, "the violin"), (1, "violin"), (2, "glacier"), (0, "oil"), (0, "")]
    found = RoundTrip(str(tmp_path / "index"), 3)([{"row": row, "text": text} for row, text in asked])
    assert [query["dropped"] for query in found] == ["", "", "round_trip", "round_trip", "", "round_trip"]


def number_in(messages):
    return int(re.search(r"number (\d+) was", messages[-1]["content"])[1])


def test_what_a_server_refuses_is_counted_and_stops_nothing(made, tmp_path, serve, capsys):  # noqa: F811
    write(tmp_path / "docs.jsonl", [document(n) for n in range(16)])
    answers = {n: f"the {SUBJECTS[n]} of shelf {n}" for n in range(16)} | {0: 400, 13: 400}
    server = serve(answer=lambda messages: answers[number_in(messages)])
    options = {"documents": str(tmp_path / "docs.jsonl"), "round_trip_top_k": 0, "generators": [entry_of(server)]}
    main(arguments(made, tmp_path / "out", shard_size=1, **options))  # a shard may have nothing but a refused one
    log = capsys.readouterr().out
    assert "openai:r1 refused document d0: BadRequestError: " in log and "bad luck" in log
    assert "openai:r1: documents refused by the server: 2\n" in log and "14 queries written, 14 kept" in log
    summary = json.loads((tmp_path / "out" / "mine.json").read_text())["generators"]["openai:r1"]
    assert (summary["refused"], summary["written"], summary["kept"]) == (2, 14, 14)
    assert asked(tmp_path / "out") == {f"d{n}" for n in range(16)} - {"d0", "d13"}
    assert len(server.requests) == 16


@pytest.mark.parametrize("shard_size", [2, 64])
def test_a_server_that_refuses_everything_ends_in_its_own_words(made, tmp_path, serve, shard_size):  # noqa: F811
    write(tmp_path / "docs.jsonl", [document(n) for n in range(16)])
    server = serve(answer=lambda messages: 400)
    generators = [{"kind": "crop"}, entry_of(server)]
    args = arguments(
        made, tmp_path / "out", documents=str(tmp_path / "docs.jsonl"), round_trip_top_k=0, generators=generators,
        shard_size=shard_size,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"refused each of the first 16 documents \(BadRequestError.*bad luck"):
        main(args)
    assert not (tmp_path / "out").exists()
    server.answer = "the one on the shelf\nwho oils it?"
    main(args)  # all are asked again
    summary = json.loads((tmp_path / "out" / "mine.json").read_text())["generators"]["openai:r1"]
    assert summary["refused"] == 0 and summary["written"] == 32


def test_answers_are_kept_however_the_server_is_reached(made, tmp_path, serve, monkeypatch):  # noqa: F811
    write(tmp_path / "docs.jsonl", [document(n) for n in range(12)])

    def answer(messages):
        return f"the {SUBJECTS[number_in(messages)]} of the house"

    busy = serve(answer=lambda messages: 503 if number_in(messages) == 9 else answer(messages))
    other = serve(answer=answer)
    monkeypatch.setenv("OTHER_KEY", "sk-other")

    options = {"documents": str(tmp_path / "docs.jsonl"), "shard_size": 4, "round_trip_top_k": 0}

    def mine(server, **changes):
        entry = entry_of(server, **{"max_retries": 0, "concurrency": 1, **changes})
        main(arguments(made, tmp_path / "out", generators=[entry], **options))

    def numbers(server):
        return [number_in(body["messages"]) for _, _, body in server.requests]

    for changes in ({}, {"timeout": 5, "requests_per_minute": 10_000, "max_retries": 1}):
        with pytest.raises(RuntimeError, match="gave no answer"):
            mine(busy, **changes)
    assert [n for n in numbers(busy) if n < 8] == list(range(8)) and numbers(busy).count(9) == 3
    mine(other, api_key_env="OTHER_KEY", concurrency=3)
    assert sorted(numbers(other)) == [8, 9, 10, 11]
    assert len(asked(tmp_path / "out")) == 12
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(RuntimeError, match="gave no answer"):
        mine(busy)
    mine(other, temperature=0.1)  # other answers: all are asked
    assert len(other.requests) == 4 + 12


def asked(folder):
    return {row["document"] for row in read_jsonl(folder, "queries")}


def test_the_sample_depends_on_seed_and_ids_alone(made, tmp_path):
    documents = [document(n) for n in range(80)]
    random.Random(3).shuffle(documents)
    write(tmp_path / "shuffled.jsonl", documents)
    options = {"sample": 20, "round_trip_top_k": 0}
    main(arguments(made, tmp_path / "a", **options))
    main(arguments(made, tmp_path / "b", documents=str(tmp_path / "shuffled.jsonl"), shard_size=3, **options))
    main(arguments(made, tmp_path / "c", seed=1, **options))
    judged = [{q: d for q, d in read_qrels(tmp_path / name, "test").items()} for name in "ab"]
    sides = [{next(iter(d)) for d in qrels.values()} for qrels in judged]
    assert asked(tmp_path / "a") == asked(tmp_path / "b") != asked(tmp_path / "c") and sides[0] == sides[1]
    assert len(asked(tmp_path / "a")) == 20 and len(list(read_jsonl(tmp_path / "a", "corpus"))) == 80
    texts = [{(q["document"], q["text"]) for q in read_jsonl(tmp_path / name, "queries")} for name in "ab"]
    assert texts[0] == texts[1]


@given(st.lists(st.integers(0, LAST), unique=True), st.integers(0, 10))
def test_lowest_keeps_the_lowest(numbers, size):
    lowest = Lowest(size)
    for number in numbers:
        lowest.put(number)
    assert [n for n in sorted(numbers) if n <= lowest.limit] == sorted(numbers)[:size]


def test_only_documents_in_the_languages_asked_for_get_queries(made, tmp_path):
    options = {"documents": str(made / "mixed.jsonl"), "languages": ["de"], "sample": 5, "round_trip_top_k": 0}
    main(arguments(made, tmp_path / "de", **options))
    assert len(asked(tmp_path / "de")) == 5 and all(key.startswith("g") for key in asked(tmp_path / "de"))
    main(arguments(made, tmp_path / "any", documents=str(made / "mixed.jsonl"), round_trip_top_k=0))
    counts = json.loads((tmp_path / "any" / "mine.json").read_text())
    assert counts["documents_asked_by_language"] == {"de": 8, "en": 20}
    with pytest.raises(ValueError, match=r"no document in \['ko'\]"):
        main(arguments(made, tmp_path / "ko", **{**options, "languages": ["ko"]}))


def test_two_workers_write_what_one_writes(made, tmp_path):
    main(arguments(made, tmp_path / "one", round_trip_top_k=0))
    main(arguments(made, tmp_path / "two", round_trip_top_k=0, workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_ray_writes_what_one_process_writes(made, tmp_path, local_ray, monkeypatch):  # noqa: F811
    options = {"shard_size": 40, "round_trip_top_k": 1}
    main(arguments(made, tmp_path / "one", **options))
    monkeypatch.setattr(shards, "run_local", lambda *_: pytest.fail("not on Ray"))
    main(arguments(made, tmp_path / "ray", engine="ray", workers=2, **options))
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
    assert json.loads((tmp_path / "ray" / "mine.json").read_text())["generators"]["crop"]["dropped"]["round_trip"] > 0


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny causal model that is made to end its lines and its answers."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer = chat_tokenizer(folder)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = Qwen3ForCausalLM(tiny_config("qwen3", eos_token_id=end, max_position_embeddings=2048))
    (line_end,) = tokenizer("\n")["input_ids"]
    model.generation_config.sequence_bias = [[[line_end], 5.0], [[end], 4.0]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def kill_when(path, command):
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"ended before {path} was there:\n{process.stdout.read()}")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_run_goes_on_and_writes_the_same_bytes(made, talker, tmp_path):
    local = {"kind": "local", "model": talker, "dtype": "float32", "new_tokens": 48, "batch_size": 2, "top_p": 1.0}
    options = {"generators": [{"kind": "crop"}, local], "shard_size": 2, "round_trip_top_k": 80}
    whole, broken = arguments(made, tmp_path / "whole", **options), arguments(made, tmp_path / "broken", **options)
    main(whole)
    config, work = tmp_path / "mine.yaml", tmp_path / "broken.work"
    config.write_text(yaml.safe_dump(asdict(broken)))
    command = [sys.executable, "-m", "recipes.mine", "--config", str(config)]
    stamps = []
    for generator in range(2):  # killed while it crops, and again while the model writes
        folder = work / f"written-{generator}"
        kill_when(folder / "shard-00003.parquet", command)
        shards = sorted(folder.glob("shard-*.parquet"))
        assert 4 <= len(shards) < 40 and not (tmp_path / "broken").exists()
        stamps.append({shard: shard.stat().st_mtime_ns for shard in shards[:3]})
        assert all(shard.stat().st_mtime_ns == stamp for old in stamps for shard, stamp in old.items())
    main(broken)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert not work.exists()
    summary = json.loads((tmp_path / "whole" / "mine.json").read_text())
    assert all(generator["kept"] for generator in summary["generators"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generators": []}, "generators is empty"),
        ({"generators": [{"kind": "crops"}]}, "must be one of crop, local, openai"),
        ({"held_aside": 1.0}, "held_aside is 1.0"),
        ({"shard_size": 0}, "shard_size is 0; it must be at least 1"),
        ({"sample": 0}, "sample is 0; it must be at least 1, or null"),
        ({"retriever_tokenizer": None}, "give retriever_tokenizer, or round_trip_top_k: 0"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_read(made, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(made, tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())
