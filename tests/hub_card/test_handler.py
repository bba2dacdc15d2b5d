"""What Inference Endpoints run of a release: its handler.py, from the folder as it is built."""

import importlib.util

from transformers import pipeline

from hub_card.build import build
from tests.models_for_tests import folder_of

INPUTS = {"query": "rain", "texts": ["Rain fell all night.", "The train stops twice.", "oil"]}


def test_the_handler_of_a_release_ranks(tmp_path):
    folder = build(folder_of("bert"), tmp_path / "release", "# A tiny model\n")
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder))
    expected = pipeline("text-ranking", model=str(folder), trust_remote_code=True)(INPUTS)
    assert handler({"inputs": INPUTS}) == expected
    assert handler({"inputs": INPUTS, "parameters": {"top_k": 1, "return_documents": False}}) == [
        {key: value for key, value in expected[0].items() if key != "document"}
    ]
