"""Links, files and lines of Python that a visitor takes away."""

import base64
import csv
import io
import json
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import querit
from querit import HUB_ID
from space_app.limits import Limits, RefusedError
from space_app.models import Models
from space_app.ranking import Request, make_request, rank
from space_app.share import as_csv, as_json, as_python, pack, unpack_link
from tests.space_app.test_ranking import DOCUMENTS, QUERY, finish

LIMITS = Limits()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(TEXT, st.lists(TEXT, max_size=5), st.none() | TEXT.filter(bool), st.sampled_from(["truncate", "max_passage"]))
def test_a_link_carries_everything(query, documents, instruction, long_documents):
    found = unpack_link("#" + pack(Request(query, documents, instruction, long_documents, "Nano"), LIMITS), LIMITS)
    assert (found.query, found.documents, found.instruction) == (query, documents, instruction or "")
    assert (found.long_documents, found.model) == (long_documents, "Nano")


def fragment(data: bytes) -> str:
    return "#r=" + base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_other_fragments_are_none_of_ours():
    for text in ("", "#", "#section", None, 3, ["r="]):
        assert unpack_link(text, LIMITS) is None


@pytest.mark.parametrize(
    "link",
    [
        "#r=",
        "#r=%%%",
        "#r=é",
        fragment(b"no zlib"),
        fragment(zlib.compress(b"no json")),
        fragment(zlib.compress(b"[]")),
        fragment(zlib.compress(json.dumps({"q": "a"}).encode())),
        fragment(zlib.compress(json.dumps({"q": 1, "d": ["a"]}).encode())),
        fragment(zlib.compress(json.dumps({"q": "a", "d": "text"}).encode())),
        fragment(zlib.compress(json.dumps({"q": "a", "d": [{}]}).encode())),
        fragment(zlib.compress(b"[" * 100_000)),
        fragment(zlib.compress(json.dumps({"q": "a", "d": ["b"]}).encode())[:-3]),
        fragment(zlib.compress(b" " * 12_000_000)),  # a bomb of 16 kB
        "#r=" + "A" * 20_000,
    ],
)
def test_damaged_links_are_refused(link):
    with pytest.raises(RefusedError, match="link is damaged"):
        unpack_link(link, LIMITS)


def test_what_is_too_long_for_a_link_is_said():
    documents = [f"{n:x} {hash(str(n))}" for n in range(3000)]
    with pytest.raises(RefusedError, match="characters; share the JSON file instead"):
        pack(Request("q", documents, None, "truncate", "Nano"), LIMITS)


@pytest.fixture(scope="module")
def ranked(models):
    documents = [*DOCUMENTS, "=1+1", "line\nbreak, \"quoted\" '''and''' \\ slashed {braces}"]
    request = make_request(models, LIMITS, QUERY, documents, "Find facts.", model="Causal")
    return finish(rank(models, LIMITS, request))[0]


def test_files_hold_the_ranking(ranked):
    stored = json.loads(as_json(ranked))
    assert stored["documents"] == ranked.request.documents and stored["query"] == QUERY
    assert [row["index"] for row in stored["results"]] == [result.index for result in ranked.results]
    rows = list(csv.DictReader(io.StringIO(as_csv(ranked).removeprefix("\ufeff"), newline="")))
    assert [float(row["score"]) for row in rows] == [result.score for result in ranked.results]
    # A spreadsheet must not take a document for a formula.
    texts = {row["document"] for row in rows}
    assert "'=1+1" in texts and texts - {"'=1+1"} == set(ranked.request.documents) - {"=1+1"}


@pytest.mark.parametrize("long", [False, True])
def test_the_lines_of_python_give_the_same_result(models, ranked, tmp_path, long):
    if long:
        request = make_request(models, LIMITS, QUERY, ["word " * 1500, *DOCUMENTS], None, "max_passage", "Nano")
        ranked = finish(rank(models, LIMITS, request))[0]
        (tmp_path / "ranking.json").write_text(as_json(ranked), encoding="utf-8")
    code = as_python(ranked, models)
    assert ("json.load" in code) == long and code.count("\n") < 16
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = run.stdout
    for result in ranked.results:
        text = f"{ranked.request.documents[result.index]}\n"
        score, _, found = found.partition(" ")
        assert float(score) == pytest.approx(result.score, abs=0.02) and found.startswith(text)
        found = found.removeprefix(text)


def test_a_model_is_named_so_that_the_lines_run_and_a_folder_to_its_owner_alone(tmp_path):
    (tmp_path / "secret").mkdir()
    sources = {"hub": "org/name@abc", "own": str(tmp_path / "secret"), "nano": str(querit.RELEASED)}
    visited, at_home = Models(sources), Models(sources, at_home=True)
    assert visited.python_arguments("hub") == at_home.python_arguments("hub") == "'org/name', revision='abc'"
    assert visited.python_arguments("own") == "'path/to/secret'" and visited.python_arguments("nano") == repr(HUB_ID)
    assert at_home.python_arguments("own") == repr(str(tmp_path / "secret"))
