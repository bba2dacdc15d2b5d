"""infinity's own server beside the pipeline, on Nano as it is. PYTHON_OF_INFINITY is the python that has it."""

import math
from pathlib import Path

import pytest

from hub_card.engines import installed_ranker
from hub_card.probes import PROBES
from tests.integrations.servers_for_tests import post, python_of, serving

NANO = Path(__file__).parents[2] / "hub_card" / "querit-reranker-nano"
COMMAND = """
infinity_emb v2 --model-id querit-reranker-nano --no-trust-remote-code --engine torch --device cpu --dtype float32
--no-bettertransformer --no-compile --no-model-warmup --host 127.0.0.1 --port {port}
"""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "OMP_NUM_THREADS": "1"}


def test_nano_is_served_as_it_is(tmp_path):
    command = str(Path(python_of("PYTHON_OF_INFINITY")).with_name("infinity_emb"))
    with serving([command, *COMMAND.split()[1:]], NANO.parent, ENVIRONMENT, tmp_path / "log") as address:
        ranker = installed_ranker(NANO)
        for query, documents in PROBES.items():
            ranked = ranker(query, documents)
            asked = {"model": NANO.name, "query": query, "documents": documents}
            found = post(f"{address}/rerank", **asked)["results"]
            expected = {row["index"]: row["probability"] for row in ranked}
            assert {row["index"]: row["relevance_score"] for row in found} == pytest.approx(expected, abs=1e-5)
            assert [row["relevance_score"] for row in found] == pytest.approx(
                [row["probability"] for row in ranked], abs=1e-5
            )
            raw = post(f"{address}/rerank", **asked, raw_scores=True, top_n=1)["results"]
            assert raw[0]["relevance_score"] == pytest.approx(math.log(1 / (1 - max(expected.values())) - 1), abs=1e-3)
