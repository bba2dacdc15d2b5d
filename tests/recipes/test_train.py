import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, HfArgumentParser, pipeline
from trl import RewardConfig

from hub_card.provenance import merges_of
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from modeling_querit.scoring_querit import score_pairs
from recipes.train import (
    GroupCollator,
    ScriptArguments,
    distil_loss,
    is_finished,
    kl_loss,
    last_whole_checkpoint,
    main,
    margin_loss,
    states_loss,
)
from tests.recipes.folders_for_tests import SUBJECTS, tiny_backbone

ROOT = Path(__file__).parents[2]
groups = st.lists(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def as_matrices(rows):
    most = max(map(len, rows))
    scores, labels = torch.zeros(len(rows), most), torch.zeros(len(rows), most)
    real = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, (score, label) in enumerate(row):
            scores[i, j], labels[i, j], real[i, j] = score, label, True
    # What stands in the padding must not matter.
    return scores.masked_fill(~real, 9.0), labels.masked_fill(~real, 7.0), real


@given(groups)
def test_margin_loss_is_the_mean_over_ordered_pairs(rows):
    losses = [
        max(0.0, 0.8 * (y_i - y_j) - (s_i - s_j)) for row in rows for s_i, y_i in row for s_j, y_j in row if y_i > y_j
    ]
    expected = sum(losses) / len(losses) if losses else 0.0
    assert margin_loss(*as_matrices(rows), scale=0.8).item() == pytest.approx(expected, abs=1e-5)


@given(groups)
def test_kl_loss_is_the_mean_divergence_of_the_groups(rows):
    expected = 0.0
    for row in rows:
        p = torch.softmax(torch.tensor([y for _, y in row], dtype=torch.float64) / 0.15, 0)
        q = torch.softmax(torch.tensor([s for s, _ in row], dtype=torch.float64), 0)
        expected += (p * (p / q).log()).sum().item() / len(rows)
    assert kl_loss(*as_matrices(rows), temperature=0.15).item() == pytest.approx(expected, abs=1e-4)


@given(groups)
def test_distillation_is_the_divergence_at_a_temperature_and_the_squared_error(rows):
    """Here the numbers called labels are the teacher's logits."""
    expected, errors = 0.0, []
    for row in rows:
        p = torch.softmax(torch.tensor([t for _, t in row], dtype=torch.float64) / 2, 0)
        q = torch.softmax(torch.tensor([s for s, _ in row], dtype=torch.float64) / 2, 0)
        expected += (p * (p / q).log()).sum().item() / len(rows)
        errors += [(s - t) ** 2 for s, t in row]
    expected += 0.3 * sum(errors) / len(errors)
    found = distil_loss(*as_matrices(rows), temperature=2.0, mse_weight=0.3).item()
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_batch_without_pairs_gives_no_gradient_and_no_nan():
    scores = torch.zeros(2, 3, requires_grad=True)
    loss = margin_loss(scores, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.8)
    loss.backward()
    assert loss.item() == 0 and scores.grad.abs().sum() == 0


def test_collator_keeps_each_label_beside_its_pair():
    batch = GroupCollator(0)(
        [{"input_ids": [[5, 6], [7]], "labels": [1.0, 0.2]}, {"input_ids": [[8, 9, 10]], "labels": [0.5]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["labels"][batch["real"]].tolist() == pytest.approx([1.0, 0.2, 0.5])
    assert batch["real"].tolist() == [[True, True], [True, False]]


def test_segments_stand_beside_their_tokens():
    first = {"input_ids": [[5, 6], [7]], "token_type_ids": [[0, 1], [1]], "labels": [1.0, 0.2]}
    second = {"input_ids": [[8, 9, 10]], "token_type_ids": [[0, 0, 1]], "labels": [0.5]}
    assert GroupCollator(0)([first, second])["token_type_ids"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_states_of_the_tokens_that_both_sides_share_are_compared():
    """A translated question has the English passage: its tokens, and the first one, which the score is read off."""
    translated = {
        "input_ids": [[2, 50, 51, 52, 3, 7, 8, 3], [2, 50, 51, 52, 3, 9, 3]], "labels": [1.0, -1.0],
        "english_input_ids": [[2, 20, 3, 7, 8, 3], [2, 20, 3, 9, 3]],
        "token_type_ids": [[0] * 5 + [1] * 3, [0] * 5 + [1] * 2],
        "english_token_type_ids": [[0] * 3 + [1] * 3, [0] * 3 + [1] * 2],
    }  # fmt: skip
    alone = {"input_ids": [[2, 4, 3, 5, 3]], "token_type_ids": [[0, 0, 0, 1, 1]], "labels": [0.5]}
    alone |= {"english_input_ids": [], "english_token_type_ids": []}
    foreign = translated | {"english_input_ids": [[2, 20, 3, 30, 31, 3], [2, 20, 3, 32, 3]]}
    batch = GroupCollator(0)([alone, translated, foreign])
    assert batch["english"]["input_ids"].shape == (4, 6) and batch["english"]["attention_mask"].sum() == 22
    firsts = [[1, 0, 0, 0], [2, 0, 1, 0], [3, 0, 2, 0], [4, 0, 3, 0]]  # pairs 0 has no English side
    passages = [[1, 4, 0, 2], [1, 5, 0, 3], [1, 6, 0, 4], [1, 7, 0, 5], [2, 4, 1, 2], [2, 5, 1, 3], [2, 6, 1, 4]]
    ends = [[3, 7, 2, 5], [4, 6, 3, 4]]  # of the foreign passages the last token alone
    assert sorted(batch["matched"].tolist()) == sorted(firsts + passages + ends)
    assert "english" not in GroupCollator(0)([alone])

    states = torch.randn(2, 3, 4)
    matched = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [0, 2, 0, 1]])
    turned = states.clone()
    turned[1, 0] = -states[1, 0]  # one of two firsts says the opposite
    turned[0, 1] = 3 * states[0, 2]  # length does not count
    assert states_loss(states, turned, matched).item() == pytest.approx((2 / 2 + 0) / 2, abs=1e-6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plain backbone and groups in which the document that names the subject is right."""
    folder = tmp_path_factory.mktemp("train")
    tiny_backbone(folder / "base")
    rows = []
    for i in range(64):
        subject, other, third = (SUBJECTS[(i + k * 5) % len(SUBJECTS)] for k in range(3))
        documents = [f"the {subject} is oiled", f"the {other} is dry", f"a {third} and a {other}"]
        rows.append({"query": f"how to keep a {subject}", "documents": documents, "labels": [1.0, 0.1, 0.0]})
        rows[-1]["scores"] = [6.0, -4.0, -4.0]
    Dataset.from_list(rows).to_parquet(str(folder / "data.parquet"))
    return folder


def settings(made, output, loss="kl", **changes):
    return {
        "model_name_or_path": str(made / "base"), "train_data": str(made / "data.parquet"), "pooling": "mean",
        "loss": loss, "attn_implementation": "eager", "output_dir": str(output),
        "max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 5, "save_steps": 20,
        "max_length": 48, "bf16": True, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "seed": 3, **changes,
    }  # fmt: skip


def run(made, output, loss="kl", **changes):
    script, config = HfArgumentParser((ScriptArguments, RewardConfig)).parse_dict(
        settings(made, output, loss, **changes)
    )
    main(script, config)
    return output


def test_the_teachers_logits_are_learnt_by_level(made, tmp_path):
    out = run(made, tmp_path / "model", "distil", mse_weight=0.2, max_steps=160)
    model = QueritForSequenceClassification.from_pretrained(out)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(out), 48)
    right, wrong = [], []
    for subject, other in zip(SUBJECTS, SUBJECTS[5:] + SUBJECTS[:5], strict=True):
        pairs = encoder.encode(f"how to keep a {subject}", [f"the {subject} is oiled", f"the {other} is dry"])
        logits = score_pairs(model, pairs, 0).tolist()
        right.append(logits[0])
        wrong.append(logits[1])
    assert sum(right) / len(right) == pytest.approx(6, abs=2) and sum(wrong) / len(wrong) == pytest.approx(-4, abs=2)


def test_states_of_the_english_sides_are_learnt(made, tmp_path):
    """From the model as it is: with English sides for twins of its words it says of them what it says of the words."""
    data = load_dataset("parquet", data_files=str(made / "data.parquet"), split="train")
    mirrored = data.map(lambda row: {"english_query": row["query"], "english_documents": row["documents"]})
    mirrored.map(lambda row: {"query": row["query"].upper() + " x"}).to_parquet(tmp_path / "groups.parquet")
    start = run(made, tmp_path / "start", "distil", max_steps=1)
    apart = {}
    for weight in (0.0, 3.0):
        out = run(
            made, tmp_path / f"states{weight}", "distil", model_name_or_path=str(start), states_weight=weight,
            train_data=str(tmp_path / "groups.parquet"), states_teacher=str(start), states_layers=[1], logging_steps=1,
        )  # fmt: skip
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        apart[weight] = [row["states_apart"] for row in history if "states_apart" in row]
    assert apart[0.0][0] == apart[3.0][0] and apart[3.0][-1] < 0.5 * apart[0.0][-1]
    with pytest.raises(ValueError, match="no English sides"):
        run(made, tmp_path / "x", "distil", states_teacher=str(start), states_layers=[1])
    with pytest.raises(ValueError, match="states_layers names layer 9, but"):
        run(
            made, tmp_path / "z", "distil", train_data=str(tmp_path / "groups.parquet"), states_teacher=str(start),
            states_layers=[9],
        )  # fmt: skip
    with pytest.raises(ValueError, match="goes with loss: distil"):
        run(made, tmp_path / "y", "kl", states_teacher=str(start))


def test_words_have_a_learning_rate_of_their_own(made, tmp_path):
    """By plain SGD, one step: the change of a weight is its rate times its gradient."""
    shared = {"max_steps": 1, "optim": "sgd", "bf16": False, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    shared |= {"learning_rate": 1e-2, "max_grad_norm": 1e9}
    runs = {rate: run(made, tmp_path / str(rate), words_learning_rate=rate, **shared) for rate in (1e-2, 5e-2)}
    slow, fast = (load_file(folder / "model.safetensors") for folder in runs.values())
    start = load_file(made / "base" / "model.safetensors")
    for name, tensor in start.items():
        one, other = slow[f"bert.{name}"] - tensor, fast[f"bert.{name}"] - tensor
        wanted = 5 * one if "word_embeddings" in name else one
        assert torch.allclose(other, wanted, rtol=1e-3, atol=1e-6), name
    with pytest.raises(ValueError, match="freeze holds the word embeddings"):
        run(made, tmp_path / "frozen", words_learning_rate=1e-3, freeze=["embeddings"])


@pytest.mark.parametrize("loss", ["kl", "margin"])
def test_training_lowers_the_loss_and_writes_a_folder_that_ranks(made, tmp_path, loss):
    out = run(made, tmp_path / "model", loss)
    history = [
        row["loss"] for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]
    assert history[-1] < 0.6 * history[0]
    ranker = pipeline("text-ranking", model=str(out), trust_remote_code=True)
    right = sum(
        ranker(f"how to keep a {s}", ["the stone is dry", f"the {s} is oiled"])[0]["index"] == 1 for s in SUBJECTS
    )
    assert right > 0.8 * len(SUBJECTS)


def test_a_resumed_run_equals_an_unbroken_one(made, tmp_path):
    whole = run(made, tmp_path / "whole")
    broken = tmp_path / "broken"
    broken.mkdir()
    # All that a run stopped at step 25 leaves.
    shutil.copytree(whole / "checkpoint-20", broken / "checkpoint-20")
    shutil.copy(whole / "training.json", broken)
    run(made, broken)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_run_of_other_settings_is_not_taken_up(made, tmp_path):
    """Its checkpoints would be gone on from, and their weights be taken for those of the new settings."""
    out = run(made, tmp_path / "model")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"other settings \(loss changed\)"):
        run(made, out, loss="margin")
    data = tmp_path / "made"
    shutil.copytree(made, data)
    load_dataset("parquet", data_files=str(made / "data.parquet"), split="train").select(range(5)).to_parquet(
        str(data / "data.parquet")
    )
    with pytest.raises(FileExistsError, match=r"\(train_data changed\)"):
        run(data, out)
    assert (out / "model.safetensors").read_bytes() == before
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (out / "model.safetensors").rename(out / "model-00001-of-00001.safetensors")  # as large ones stand
    with pytest.raises(FileExistsError, match=r"other settings \(loss changed\)"):
        run(made, out, loss="margin")


def test_finished_is_a_training_with_its_last_state_and_its_weights(tmp_path):
    state = tmp_path / "trainer_state.json"
    assert not is_finished(tmp_path)
    state.write_text('{"global_step": 4, "max_steps": 4}')
    assert not is_finished(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert is_finished(tmp_path)
    for text in ('{"global_step": 3, "max_steps": 4}', '{"global_step": 4, "max_'):
        state.write_text(text)
        assert not is_finished(tmp_path)


def test_a_finished_training_is_not_done_again(made, tmp_path, capsys):
    out = run(made, tmp_path / "model", max_steps=4, save_steps=2)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    run(made, out, max_steps=4, save_steps=2)
    assert f"{out} is there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    (out / "model.safetensors").unlink()
    run(made, out, max_steps=4, save_steps=2)
    assert is_finished(out)


def test_a_model_trained_from_a_merged_one_keeps_the_record_of_the_merge(made, tmp_path):
    start = shutil.copytree(made, tmp_path / "made")
    (start / "base" / "merge.json").write_text('{"method": "slerp"}')
    assert merges_of(run(start, tmp_path / "model", max_steps=1)) == [{"method": "slerp"}]


def test_frozen_parameters_stay_and_others_move(made, tmp_path):
    script = ScriptArguments(
        model_name_or_path=str(made / "base"), train_data=str(made / "data.parquet"), pooling="mean", loss="kl",
        freeze=["embeddings"],
    )  # fmt: skip
    config = RewardConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, max_length=48,
    )  # fmt: skip
    main(script, config)
    before, after = load_file(made / "base" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[f"bert.{name}"]) == ("embeddings" in name), name


def test_an_unknown_loss_is_named(made, tmp_path):
    with pytest.raises(ValueError, match="margin, kl or distil"):
        run(made, tmp_path / "x", loss="hinge")


def test_two_processes_train_as_one_does(made, tmp_path):
    """`accelerate launch` with the recipes' own file, on two CPU processes that gloo connects.

    A step takes all groups. One that both or neither of the processes had would change loss, tokens and weights.
    """
    shutil.copytree(made, tmp_path / "made")
    config = tmp_path / "made" / "base" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | still))
    # Plain SGD: Adam would blow rounding up where the gradient is 0.
    shared = {"max_steps": 3, "logging_steps": 1, "save_steps": 2, "optim": "sgd", "learning_rate": 0.1, "bf16": False}
    shared |= {"train_sampling_strategy": "group_by_length"}
    one = run(tmp_path / "made", tmp_path / "one", per_device_train_batch_size=64, **shared)
    two = tmp_path / "two"
    yaml = tmp_path / "train.yaml"
    yaml.write_text(json.dumps(settings(tmp_path / "made", two, per_device_train_batch_size=32, **shared)))
    launcher = ["--config_file", str(ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0"]
    command += ["-m", "recipes.train", "--config", str(yaml)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    state, expected = (json.loads((folder / "trainer_state.json").read_text()) for folder in (two, one))
    assert state["global_step"] == 3 and state["epoch"] == 3.0  # 64 groups a step
    for row, other in zip(state["log_history"][:3], expected["log_history"][:3], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert row["num_input_tokens_seen"] == other["num_input_tokens_seen"]
    checkpoint = Path(last_whole_checkpoint(str(two)))
    assert checkpoint.name == "checkpoint-3" and len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert [path.name for path in two.glob("*.safetensors")] == ["model.safetensors"]
    found, saved, wanted = (
        QueritForSequenceClassification.from_pretrained(folder).state_dict() for folder in (two, checkpoint, one)
    )
    start = load_file(tmp_path / "made" / "base" / "model.safetensors")
    moved = apart = 0.0
    for name, tensor in wanted.items():
        assert torch.equal(found[name], saved[name]), name
        apart += (found[name] - tensor).square().sum().item()
        if name.removeprefix("bert.") in start:
            moved += (tensor - start[name.removeprefix("bert.")]).square().sum().item()
    assert apart < 1e-4 * moved  # squared: a hundredth of the way that training went
