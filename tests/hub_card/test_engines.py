"""One folder, every engine: what the pipeline scores, all others score, to the stated tolerance."""

import json
import math
import os
import re
import subprocess
import sys
from functools import cache

import mteb
import pytest
import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_implementations.querit_models import QueritWrapper
from sentence_transformers import CrossEncoder
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from hub_card.engines import ENGINES, installed_ranker
from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from tests.hub_card.folders_for_tests import NANO, built, by_index
from tests.hub_card.test_convert import converted

TOLERANCE = 2e-5  # of scores and probabilities, in float32
QUERY = "What does a bicycle need?"
DOCUMENTS = [
    "A bicycle needs oil on the chain.",
    "The lighthouse keeper wrote the weather down.",
    "图书馆每天早上九点开门，周末休息。",
    "Prices in 2024: $1,299.00, i.e. -10.4%; 😀",
    "x",
    "",
]
LONG = "The home team won by two goals. " * 100
REQUESTS = {QUERY: DOCUMENTS, "誰が灯台を守るの": DOCUMENTS[::-1]}


FOLDERS = {
    "nano": lambda: NANO,
    "qwen3": lambda: built("qwen3"),
    "deepseek_v3": lambda: built("deepseek_v3"),
    "bert": lambda: built("bert"),
    "converted": lambda: converted("qwen3"),
}
CAUSAL = ["qwen3", "deepseek_v3", "converted"]


@cache
def ranker(name: str):
    return installed_ranker(FOLDERS[name]())


@cache
def cross_encoder(name: str, **options) -> CrossEncoder:
    options = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}, **options}
    return CrossEncoder(str(FOLDERS[name]()), **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FOLDERS)
def test_scores(name, engine):
    expected = [score for query, texts in REQUESTS.items() for score in by_index(ranker(name)(query, texts))]
    assert max(expected) - min(expected) > 0.02  # they say something
    assert ENGINES[engine](FOLDERS[name](), REQUESTS) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", FOLDERS)
def test_cross_encoder_ranks_without_remote_code(name):
    model, results = cross_encoder(name), ranker(name)(QUERY, DOCUMENTS)
    assert type(model[0].model).__module__.startswith("transformers.models.")
    ranked = model.rank(QUERY, DOCUMENTS, top_k=4)
    assert [row["corpus_id"] for row in ranked] == [result["index"] for result in results[:4]]
    # Who trusts the code gets the same.
    pairs = [(QUERY, document) for document in DOCUMENTS]
    trusting = cross_encoder(name, trust_remote_code=True)
    assert type(trusting[0].model).__module__.startswith("transformers_modules.")
    assert trusting.predict(pairs) == pytest.approx(by_index(results, "probability"), abs=TOLERANCE)


def test_a_bert_loads_without_trust_and_without_a_word():
    """No report of missing or unexpected keys, no class that was "newly initialized": a person stops there."""
    code = (
        "import sys; from sentence_transformers import CrossEncoder; from transformers import pipeline; "
        "CrossEncoder(sys.argv[1]).predict([('a', 'b')]); "
        "pipeline('text-classification', model=sys.argv[1], device='cpu')({'text': 'a', 'text_pair': 'b'})"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(built("bert"))], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("(?i)missing|unexpected|newly initialized|trust_remote_code|warning", done.stderr), done.stderr


@pytest.mark.parametrize("name", FOLDERS)
def test_cross_encoder_truncates_as_the_pipeline(name):
    model, limit = cross_encoder(name), ranker(name).max_length
    features = model.preprocess([(QUERY, LONG), (QUERY, "short")])
    ids, mask = features["input_ids"], features["attention_mask"]
    assert ids.shape == (2, limit)
    assert mask[0].all()
    end = model.tokenizer.convert_tokens_to_ids("[CLS]" if name in CAUSAL else "[SEP]")
    assert [row[real.bool()][-1].item() for row, real in zip(ids, mask, strict=True)] == [end, end]
    [result] = ranker(name)(QUERY, [LONG])
    assert result["truncated"]
    assert model.predict([(QUERY, LONG)])[0] == pytest.approx(result["probability"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("weight", "bias", "pooling"), [((2, 4), (2,), "max"), ((1, 4), (1,), "last"), ((2, 4), (4,), "last")]
)
def test_modules_of_another_head_or_read_out_are_refused(weight, bias, pooling, tmp_path):
    with pytest.raises(ValueError, match=r"pooling|head"):
        write_sentence_transformers_files(tmp_path, torch.zeros(weight), torch.zeros(bias), pooling, True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", CAUSAL)
def test_mtebs_published_wrapper(name):
    wrapper = QueritWrapper(str(FOLDERS[name]()), device="cpu", batch_size=4, fp_options=torch.float32)
    assert wrapper.max_length == ranker(name).max_length - 1
    queries, documents = (
        DataLoader(Dataset.from_dict({"text": texts}), batch_size=4) for texts in ([QUERY] * len(DOCUMENTS), DOCUMENTS)
    )
    scores = wrapper.predict(queries, documents, task_metadata=None, hf_split="test", hf_subset="default")
    assert scores == pytest.approx(by_index(ranker(name)(QUERY, DOCUMENTS)), abs=TOLERANCE)


class SmallTask(AbsTaskRetrieval):
    """Two questions, each with candidates, one of them relevant."""

    metadata = TaskMetadata(
        name="SmallReranking",
        description="Written for this test.",
        dataset={"path": "none/none", "revision": "1"},
        type="Reranking",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, num_proc=None, **kwargs):
        places = [f"d{index}" for index in range(len(DOCUMENTS) - 1)]  # mteb drops empty documents
        queries = dict(zip(("q0", "q1"), REQUESTS, strict=True))
        data = {
            "corpus": Dataset.from_dict({"id": places, "text": DOCUMENTS[:-1]}),
            "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
            "relevant_docs": {"q0": {"d0": 1}, "q1": {"d1": 1}},
            "top_ranked": {"q0": places, "q1": places[:3]},
        }
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


@pytest.mark.parametrize("name", FOLDERS)
def test_mtebs_cross_encoder(name, tmp_path):
    task, gains = SmallTask(), []
    task.load_data()
    ranked = task.dataset["default"]["test"]["top_ranked"]
    model = cross_encoder(name)
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, prediction_folder=tmp_path).task_results
    predicted = json.loads((tmp_path / task.prediction_file_name).read_text())["default"]["test"]
    for number, query in enumerate(REQUESTS):
        places = ranked[f"q{number}"]
        rows = ranker(name)(query, [DOCUMENTS[int(place[1:])] for place in places])
        expected = {places[row["index"]]: row["probability"] for row in rows}
        assert predicted[f"q{number}"] == pytest.approx(expected, abs=TOLERANCE)
        rank = 1 + [places[row["index"]] for row in rows].index(f"d{number}")
        gains.append(1 / math.log2(1 + rank))  # nDCG of one relevant document (Järvelin and Kekäläinen 2002)
    assert result.get_score() == pytest.approx(sum(gains) / 2, abs=1e-4)


@pytest.mark.parametrize("name", ["nano", "bert", "qwen3", "deepseek_v3"])
def test_trls_reward_trainer_takes_the_folder(name, tmp_path):
    folder = FOLDERS[name]()
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(folder), 64)
    first, second = ([pair.input_ids for pair in encoder.encode(query, DOCUMENTS[:4])] for query in REQUESTS)
    data = Dataset.from_dict({"chosen_ids": first, "rejected_ids": second})
    config = RewardConfig(
        tmp_path / "run", per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, bf16=False, use_cpu=True,
        trust_remote_code=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(str(folder), config, train_dataset=data)
    with torch.no_grad():  # its loss before the step, by hand: -log sigmoid of the logits' difference
        logits = [[trainer.model(torch.tensor([ids])).logits.item() for ids in rows] for rows in (first, second)]
    expected = sum(math.log1p(math.exp(b - a)) for a, b in zip(*logits, strict=True)) / len(first)
    result = trainer.train()
    assert result.training_loss == pytest.approx(expected, rel=0.2)  # there with dropout
    trainer.save_model(str(tmp_path / "saved"))
    before, after = (QueritForSequenceClassification.from_pretrained(path) for path in (folder, tmp_path / "saved"))
    assert not torch.equal(before.relevance_head.weight.float(), after.relevance_head.weight.float())
    assert not torch.equal(before.get_input_embeddings().weight.float(), after.get_input_embeddings().weight.float())
