"""Alignment: states of other languages' sentences brought to those of their English sides."""

import shutil

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertForSequenceClassification
from trl import RewardConfig

from recipes.align import (
    AlignArguments,
    PairCollator,
    SentencePairs,
    alignment_loss,
    load_lower,
    main,
    read_sentences,
    states_of,
)
from recipes.base import BaseArguments
from recipes.base import main as make_base
from tests.recipes.folders_for_tests import tiny_retriever
from tests.recipes.nano_for_tests import kinds, save_parallel, save_teacher, save_vocabulary, sentences

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align")
    save_teacher(folder / "teacher")
    save_vocabulary(folder / "vocabulary")
    save_parallel(folder / "parallel.jsonl", sentences(60))
    tiny_retriever(folder / "encoder")
    # Without translations: words have their encoder's random neighbours, and everything is to be learnt.
    make_base(
        BaseArguments(
            vocabulary=str(folder / "vocabulary"), teacher=str(folder / "teacher"), encoder=str(folder / "encoder"),
            output_dir=str(folder / "base"), languages=["de"], parallel=[],
        )
    )  # fmt: skip
    return folder


def arguments(folder) -> AlignArguments:
    return AlignArguments(
        model_name_or_path=str(folder / "base"), vocabulary=str(folder / "vocabulary"),
        languages={"de": 1.0, "ja": 2.0}, parallel=[str(folder / "parallel.jsonl")], layers=2,
        layer_weights={1: 0.5, 2: 1.0}, words_learning_rate=0.05,
    )  # fmt: skip


def settings(folder, output="aligned", **changes) -> RewardConfig:
    values = {
        "output_dir": str(folder / output), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2, "save_steps": 4, "logging_steps": 2, "bf16": False, "use_cpu": True,
        "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True, "weight_decay": 0.01,
    }  # fmt: skip
    return RewardConfig(**(values | changes))


def test_a_batch_is_what_the_tokenizers_own_template_makes(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "vocabulary")
    texts = [("das hund sieht", "パンを"), ("the old ship", "das kleines haus.")]
    ids = [tuple(tokenizer(side, add_special_tokens=False)["input_ids"] for side in pair) for pair in texts]
    batch = PairCollator(tokenizer).batch(ids)
    expected = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    unknown = batch["input_ids"] == tokenizer.unk_token_id
    assert torch.equal(batch["words"], ~special | unknown)


def test_the_loss_by_hand(folder):
    tokenizer, args = AutoTokenizer.from_pretrained(folder / "vocabulary"), arguments(folder)
    collate = PairCollator(tokenizer).batch
    foreign, english = collate([([9, 10], [11]), ([12], [13, 14, 15])]), collate([([20], [21, 22]), ([23, 24], [25])])
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(*side["input_ids"].shape, 4, generator=generator) for side in (foreign, english))
    found = alignment_loss(student, teacher, foreign, english, args)
    places = {"foreign": [[(1, 2), (4,)], [(1,), (3, 4, 5)]], "english": [[(1,), (3, 4)], [(1, 2), (4,)]]}
    sums = {"foreign": [], "english": [], "pooled": [], "cls": []}
    for row in range(2):
        s, t = normalize(student[row], dim=-1), normalize(teacher[row], dim=-1)
        sums["cls"].append(s[0] @ t[0])
        for segment in range(2):
            own, other = places["foreign"][row][segment], places["english"][row][segment]
            for name, asking, asked, x, y in (("foreign", own, other, s, t), ("english", other, own, t, s)):
                for place in asking:
                    cosines = torch.stack([x[place] @ y[to] for to in asked])
                    sums[name].append((torch.softmax(cosines / 0.05, 0) * cosines).sum())
            pooled = (s[list(own)].sum(0), t[list(other)].sum(0))
            sums["pooled"].append(torch.cosine_similarity(*pooled, dim=0))
    means = {name: torch.stack(values).mean() for name, values in sums.items()}
    for name, value in means.items():
        assert found[name] == pytest.approx(value.item(), abs=1e-5), name
    expected = 4 - 1.2 * means["foreign"] - 0.8 * means["english"] - means["pooled"] - means["cls"]
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone():
    given = {"de": [([n] * (n + 3), [-n] * 4) for n in range(1, 9)]}
    given["ja"] = [([100 + n] * 5, [-n] * 4) for n in range(1, 9)]
    args = AlignArguments("", "", languages={"de": 1.0, "ja": 1.0}, parallel=[])
    data = SentencePairs(given, 5, 16, 3, args)
    rows = [data[n] for n in range(len(data))]
    assert len(rows) == 80 and [data[n] for n in (79, 17, 40)] == [rows[n] for n in (79, 17, 40)]
    assert SentencePairs(given, 5, 16, 4, args)[17] != rows[17] or SentencePairs(given, 5, 16, 4, args)[18] != rows[18]
    for start in range(0, 80, 16):  # padded little
        lengths = [sum(map(len, row["foreign"])) for row in rows[start : start + 16]]
        assert lengths == sorted(lengths)
    english = [any(side[0] < 0 for side in row["foreign"]) for row in rows]
    assert 10 < sum(english) < 40  # 0.3 of them
    assert not any(all(side[0] < 0 for side in row["foreign"]) for row in rows)


def distance(folder, model) -> float:
    """Of sentences that were not trained on, over all layers that are matched."""
    args = arguments(folder)
    args.parallel = [str(save_parallel(folder / "held.jsonl", sentences(20, seed=9)))]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    pairs = SentencePairs(read_sentences(tokenizer.backend_tokenizer, args), 1, 40, 0, args)
    batch = PairCollator(tokenizer)([pairs[n] for n in range(40)])
    args.model_name_or_path = str(folder / model)
    student = load_lower(args, torch.float32).eval()
    args.model_name_or_path = str(folder / "base")
    teacher = load_lower(args, torch.float32).eval()
    with torch.no_grad():
        states, wanted = states_of(student, batch["foreign"]), states_of(teacher, batch["english"])
        losses = [
            alignment_loss(states[n], wanted[n], batch["foreign"], batch["english"], args)["loss"] for n in (1, 2)
        ]
    return float(sum(losses))


def weights(folder) -> dict[str, torch.Tensor]:
    return BertForSequenceClassification.from_pretrained(folder).state_dict()


def test_languages_come_closer_and_what_is_english_stays(folder):
    main(arguments(folder), settings(folder))
    assert distance(folder, "aligned") < 0.8 * distance(folder, "base")
    before, after = (weights(folder / name) for name in ("base", "aligned"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".layer.0." in name for name in changed) and any(".layer.1." in name for name in changed)
    kept = (".layer.2.", "pooler", "classifier", "position", "token_type")
    assert not [name for name in changed if any(part in name for part in kept)]
    words = "bert.embeddings.word_embeddings.weight"
    held = torch.tensor([kind in ("english", "special") for kind in kinds().values()])
    same = (before[words] == after[words]).all(1)
    assert same[held].all() and not same[list(kinds()).index("▁hund")] and not same[list(kinds()).index("パン")]


def test_a_stopped_run_goes_on_to_the_same_weights(folder, capsys):
    if not (folder / "aligned").exists():
        main(arguments(folder), settings(folder))
    shutil.copytree(folder / "aligned", folder / "stopped")
    for leftover in ("model.safetensors", "trainer_state.json"):
        (folder / "stopped" / leftover).unlink()
    for checkpoint in (folder / "stopped").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-4":
            shutil.rmtree(checkpoint)
    main(arguments(folder), settings(folder, "stopped"))
    one, other = (weights(folder / name) for name in ("aligned", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    main(arguments(folder), settings(folder, "stopped"))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"learning_rate changed"):
        main(arguments(folder), settings(folder, "stopped", learning_rate=2e-3))


def test_settings_that_cannot_be_are_refused(folder):
    with pytest.raises(ValueError, match="Give max_steps"):
        main(arguments(folder), settings(folder, "none", max_steps=-1))
    args = arguments(folder)
    args.layer_weights = {1: 1.0, 4: 1.0}
    with pytest.raises(ValueError, match="names layer 4, but layers is 2"):
        main(args, settings(folder, "none"))
