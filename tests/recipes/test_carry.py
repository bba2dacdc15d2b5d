"""A trained model under a new vocabulary."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from recipes.carry import CarryArguments, main
from recipes.lib.pieces import as_transformers, unigram
from tests.recipes.nano_for_tests import kinds, save_teacher

NEW = ["▁segel", "▁hafen", "灯"]


def save_model(folder, pieces: list[str], seed: int) -> None:
    """Nano's shape in small, with a tokenizer of these pieces."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(save_teacher(folder / "teacher"))
    model.resize_token_embeddings(len(pieces), mean_resizing=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    scores = {piece: -100.0 if piece.startswith("[") else -6.0 for piece in pieces}
    as_transformers(unigram(scores)).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carry")
    old = list(kinds())
    save_model(folder / "trained", old, seed=1)
    # other places, three new pieces, and without the last two of before
    save_model(folder / "base", [*old[:5], *NEW, *reversed(old[5:-2])], seed=2)
    merge = {"method": "slerp", "models": [], "steps": []}
    (folder / "trained" / "merge.json").write_text(json.dumps(merge), encoding="utf-8")
    main(CarryArguments(str(folder / "trained"), str(folder / "base"), str(folder / "carried")))
    return folder


def test_what_was_learnt_stays_and_new_pieces_begin_as_in_the_base(folder):
    rows, ids = {}, {}
    for name in ("trained", "base", "carried"):
        rows[name] = BertForSequenceClassification.from_pretrained(folder / name).get_input_embeddings().weight
        ids[name] = AutoTokenizer.from_pretrained(folder / name).get_vocab()
    assert ids["carried"] == ids["base"]
    for piece, row in ids["carried"].items():
        source = "base" if piece in NEW else "trained"
        assert torch.equal(rows["carried"][row], rows[source][ids[source][piece]]), piece
    assert json.loads((folder / "carried" / "carried.json").read_text())["kept"] == len(rows["carried"]) - len(NEW)


def test_how_the_model_came_goes_along(folder):
    assert json.loads((folder / "carried" / "merge.json").read_text(encoding="utf-8"))["method"] == "slerp"


def test_text_of_old_pieces_is_scored_as_before(folder):
    logits = []
    for name in ("trained", "carried"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        inputs = tokenizer("the old dog sees", "das haus, the small cat", return_tensors="pt")
        with torch.no_grad():
            logits.append(BertForSequenceClassification.from_pretrained(folder / name).eval()(**inputs).logits)
    torch.testing.assert_close(*logits)


def test_a_finished_folder_is_left_as_it_is(folder, capsys):
    main(CarryArguments(str(folder / "trained"), str(folder / "base"), str(folder / "carried")))
    assert "is there already" in capsys.readouterr().out


def test_models_of_other_sizes_are_refused(folder, tmp_path):
    config = BertForSequenceClassification.from_pretrained(folder / "base").config
    config.hidden_size = 16
    BertForSequenceClassification(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"narrow .*16.*trained .*32"):
        main(CarryArguments(str(folder / "trained"), str(tmp_path / "narrow"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
