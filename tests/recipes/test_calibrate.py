import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from hub_card.provenance import merges_of
from recipes.calibrate import CalibrateArguments, fit, languages_of, main, reliability, rescale
from tests.models_for_tests import folder_of, tiny_model
from tests.recipes.folders_for_tests import SUBJECTS


def test_fit_finds_the_curve_that_drew_the_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, generator=generator) * 3
    relevant = torch.rand(20000, generator=generator) < torch.sigmoid(0.7 * logits - 1.2)
    odds = (~relevant).sum() / relevant.sum()  # King and Zeng 2001: weights by class move the intercept by their log
    assert fit(logits, relevant) == pytest.approx((0.7, -1.2 + odds.log().item()), abs=0.06)
    with pytest.raises(ValueError, match="upside down"):
        fit(-logits, relevant)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])  # one label, and two
def test_rescale_moves_the_logit_as_told(kind):
    model, ids = tiny_model(kind), torch.randint(6, 60, (3, 9))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rescale(model, 0.7, -1.2)
        after = model(input_ids=ids).logits
    assert torch.allclose(after, 0.7 * before - 1.2, atol=1e-5)


def test_reliability_by_hand():
    found = reliability(np.array([0.95, 0.85, 0.81, 0.05, 1.0]), np.array([True, True, False, False, True]))
    # Bins 0.9 (0.95 and 1.0, both relevant), 0.8 (0.85 and 0.81, one relevant), 0.0 (0.05, not). A right pair weighs a
    # sixth, a wrong one a quarter.
    second = (0.85 / 6 + 0.81 / 4) / (5 / 12)
    assert found["ece"] == pytest.approx(1 / 3 * 0.025 + 5 / 12 * (second - 0.4) + 1 / 4 * 0.05, abs=1e-4)
    alone = reliability(np.array([0.2, 0.4]), np.array([False, False]))
    assert alone["ece"] == pytest.approx(0.3) and alone["right_mean"] is None
    assert found["right_mean"] == pytest.approx(2.8 / 3, abs=1e-4) and found["wrong_mean"] == pytest.approx(0.43)
    assert [(entry["from"], entry["n"], entry["relevant"]) for entry in found["bins"]] == [
        (0.0, 1, 0.0),
        (0.8, 2, 0.4),
        (0.9, 2, 1.0),
    ]


def test_languages_are_told_by_query_and_documents():
    english = ["The tide rises twice a day because the Moon pulls on the water of the sea.", "Salt is mined in hills."]
    assert languages_of("why does the sea rise twice a day", english) == "en"
    assert languages_of("Warum steigt das Meer zweimal am Tag und sinkt dann wieder?", english) == "de-en"
    assert languages_of("海はなぜ一日に二度満ちるのですか。", english) == "ja-en"


def judged_rows(ranker):
    """Queries with candidates of which the relevant one is mostly, not always, the model's first."""
    rows = []
    for subject in SUBJECTS * 2:
        documents = [f"a {other} and a {subject}" for other in SUBJECTS[:6]]
        order = [result["index"] for result in ranker(f"keep a {subject}", documents, max_length=48)]
        best = order[0] if subject in SUBJECTS[:10] else order[3]
        relevant = [i == best for i in range(6)]
        rows.append({"query": f"keep a {subject}", "documents": documents, "relevant": relevant})
    return rows


def test_a_calibrated_folder_ranks_as_before_with_probabilities_at_even_odds(tmp_path):
    ranker = pipeline("text-ranking", model=str(folder_of("bert")), trust_remote_code=True)
    rows = judged_rows(ranker)
    Dataset.from_list(rows).to_parquet(str(tmp_path / "data.parquet"))
    merged = shutil.copytree(folder_of("bert"), tmp_path / "merged")
    (merged / "merge.json").write_text('{"method": "slerp", "earlier": [{"method": "linear"}]}')
    main(
        CalibrateArguments(
            model_name_or_path=str(merged), data=str(tmp_path / "data.parquet"), max_length=48,
            output_dir=str(tmp_path / "out"), first_group=16, groups=100,
        )
    )  # fmt: skip
    assert [merge["method"] for merge in merges_of(tmp_path / "out")] == ["linear", "slerp"]
    calibrated = pipeline("text-ranking", model=str(tmp_path / "out"), trust_remote_code=True)
    right, wrong = [], []
    for row in rows[16::2]:  # those that fit
        before, after = (r(row["query"], row["documents"], max_length=48) for r in (ranker, calibrated))
        assert [x["index"] for x in before] == [x["index"] for x in after]
        for x in after:
            (right if row["relevant"][x["index"]] else wrong).append(x["probability"])
    table = json.loads((tmp_path / "out" / "reliability.json").read_text())
    assert sum(entry["n"] for entry in table.values()) == 6 * len(
        rows[17::2]
    )  # measured on others than it was fitted on
    # A property of maximum likelihood with an intercept: the mean prediction is the rate, here a half.
    assert (np.mean(right) + np.mean(wrong)) / 2 == pytest.approx(1 / 2, abs=5e-3)


def test_what_stands_at_the_output_is_kept(tmp_path, capsys):
    ranker = pipeline("text-ranking", model=str(folder_of("bert")), trust_remote_code=True)
    Dataset.from_list(judged_rows(ranker)).to_parquet(str(tmp_path / "data.parquet"))

    def run(output, **changes):
        settings = {"data": str(tmp_path / "data.parquet"), "first_group": 16, "max_length": 48, **changes}
        main(CalibrateArguments(model_name_or_path=str(folder_of("bert")), output_dir=str(output), **settings))

    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="theirs is there already, and nothing tells how it was made"):
        run(theirs)
    assert (theirs / "notes.txt").read_text() == "years of work"
    run(out)
    report = json.loads((out / "calibrate.json").read_text())
    assert report["slope"] > 0 and report["queries"] == 8 and report["settings"]["first_group"] == 16
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    run(out)
    assert f"{out} is there already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"made with other settings \(groups\)"):
        run(out, groups=8)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "out", "theirs"]
