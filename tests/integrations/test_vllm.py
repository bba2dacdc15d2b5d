"""vLLM's own server beside the pipeline: a Qwen3 export, Nano as it is, and mass scoring.

PYTHON_OF_VLLM is the python of an environment that holds vLLM; `make integrations` builds one. A server takes minutes
to start. All run on the CPU in float32, where equal means equal.
"""

import json
import random
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests

from hub_card.engines import installed_ranker
from hub_card.export import export
from hub_card.probes import PROBES
from recipes.score import ScoreArguments, main
from tests.integrations.servers_for_tests import post, python_of, serving
from tests.models_for_tests import save_folder, tiny_model
from tests.recipes.folders_for_tests import small_set, tiny_retriever
from tests.recipes.test_shards import local_ray  # noqa: F401
from tests.tokenizers_for_tests import CORPUS

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
# One thread and little memory for keys and values: a test is no bench.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
SMALL = "--dtype float32 --enforce-eager --max-num-seqs 8"


def requests_of() -> dict[str, list[str]]:
    """The probes, and 200 pairs of sentences cut anywhere."""
    rng, asked = random.Random(0), dict(PROBES)

    def text() -> str:
        line = rng.choice(CORPUS)
        start = rng.randrange(len(line) - 8)
        return line[start : start + rng.randint(8, 200)].strip()

    while len(asked) < len(PROBES) + 10:
        asked[text()] = [text() for _ in range(20)]
    return asked


REQUESTS = requests_of()


@contextmanager
def serving_vllm(command: str, folder: Path, log: Path) -> Iterator[str]:
    """The address of `vllm serve ...`, run in `folder`."""
    # What `vllm serve` runs: the command itself asks for the version of a package `vllm`, and this one is vllm-cpu.
    served = command.replace("vllm serve", "-m vllm.entrypoints.openai.api_server --model")
    words = [python_of("PYTHON_OF_VLLM"), *shlex.split(f"{served} {SMALL} --host 127.0.0.1 --port {{port}}")]
    with serving(words, folder, ENVIRONMENT, log) as address:
        yield address


def check(address: str, folder: Path, empty: bool = True) -> None:
    """Equal probabilities by /score, and equal probabilities and order by /rerank. `empty`: of empty documents, too."""
    ranker = installed_ranker(folder)
    for query, texts in REQUESTS.items():
        documents = [text for text in texts if text or empty]
        ranked = ranker(query, documents)
        expected = [row["probability"] for row in sorted(ranked, key=lambda row: row["index"])]
        scored = post(f"{address}/score", queries=query, documents=documents)["data"]
        assert [row["score"] for row in scored] == pytest.approx(expected, abs=1e-5)
        found = post(f"{address}/rerank", query=query, documents=documents)["results"]
        assert sorted(row["index"] for row in found) == list(range(len(documents)))
        assert [row["relevance_score"] for row in found] == pytest.approx(
            [row["probability"] for row in ranked], abs=1e-5
        )
        assert [row["relevance_score"] for row in found] == pytest.approx(
            [expected[row["index"]] for row in found], abs=1e-5
        )


def command_of(readme: Path) -> str:
    """The line that starts the server, as a README shows it."""
    (command,) = re.findall(r"^vllm serve .*$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return command


def test_an_export_is_served_with_the_models_probabilities(tmp_path):
    # vLLM has kernels for heads of some sizes only.
    source = save_folder(tmp_path / "source", "qwen3", tiny_model("qwen3", head_dim=32))
    folder = export(source, tmp_path / "exported", "vllm")
    with serving_vllm(command_of(folder / "README.md"), folder, tmp_path / "log") as address:
        check(address, source)
        for probe in json.loads((folder / "export.json").read_text(encoding="utf-8"))["probes"]:
            (row,) = post(f"{address}/score", queries=probe["query"], documents=[probe["document"]])["data"]
            assert row["score"] == pytest.approx(probe["probability"], abs=1e-5)
        long = {"queries": "who won?", "documents": ["The home team won by two goals. " * 200]}
        assert requests.post(f"{address}/score", json=long, timeout=600).status_code == 400
        post(f"{address}/score", **long, max_tokens_per_doc=300)
        (query, documents), instruction = next(iter(PROBES.items())), "Find what explains it."
        found = post(f"{address}/rerank", query=query, documents=documents, instruction=instruction)["results"]
        expected = installed_ranker(source)(query, documents, instruction=instruction)
        assert [row["index"] for row in found] == [row["index"] for row in expected]
        assert [row["relevance_score"] for row in found] == pytest.approx(
            [row["probability"] for row in expected], abs=1e-5
        )


def test_a_mixture_of_experts_is_served_with_the_models_probabilities(tmp_path):
    # Heads as DeepSeek-V3 has them, and widths that vLLM has experts for.
    sizes = {
        "hidden_size": 64, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "qk_head_dim": 192, "head_dim": 64,
        "v_head_dim": 128, "kv_lora_rank": 512,
    }  # fmt: skip
    source = save_folder(tmp_path / "source", "deepseek_v3", tiny_model("deepseek_v3", **sizes))
    folder = export(source, tmp_path / "exported", "vllm")
    readme = folder / "README.md"
    options = re.findall(
        r"`(--compilation-config [^`]*|--attention-backend CPU_MLA)`", readme.read_text(encoding="utf-8")
    )
    assert len(options) == 2
    with serving_vllm(" ".join([command_of(readme), *options]), folder, tmp_path / "log") as address:
        check(address, source)


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    with serving_vllm("vllm serve querit-reranker-nano --runner pooling", NANO.parent, log) as address:
        yield address


def test_nano_is_served_as_it_is(nano):
    # Called for one pair, as vLLM does, transformers' tokenizer takes an empty document for none.
    check(nano, NANO, empty=False)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_mass_scoring_asks_it(nano, engine, tmp_path, request):
    if engine == "ray":
        request.getfixturevalue("local_ray")
    output = tmp_path / "scored.parquet"
    teacher = {"model": "querit-reranker-nano", "kind": "vllm", "url": nano}
    main(
        ScoreArguments(
            output=str(output), targets={"care": {"folders": [str(small_set(tmp_path / "en"))], "crops": 4}},
            teachers=[teacher], retriever=str(tiny_retriever(tmp_path / "retriever")), top_k=12, candidates=5,
            shard_size=8, engine=engine, workers=2,
        )
    )  # fmt: skip
    rows, ranker = pq.read_table(output).to_pylist(), installed_ranker(NANO)
    assert len(rows) == 16 + 4
    for row in rows:
        ranked = sorted(ranker(row["query"], row["documents"]), key=lambda result: result["index"])
        # The file holds four digits.
        assert row["scores"] == pytest.approx([result["probability"] for result in ranked], abs=6e-5)
