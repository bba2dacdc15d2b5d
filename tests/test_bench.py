"""What the benchmarks count, and that their page says what their results say."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from modeling_querit.modeling_querit import QueritForSequenceClassification
from tests.bench import report, shapes

CONFIGS = {
    "nano": lambda: AutoConfig.from_pretrained(shapes.NANO, trust_remote_code=False),
    "0.6B": lambda: shapes.config_06b(2),
    "4B": lambda: shapes.config_4b(1),
    "dense 0.4B": lambda: shapes.config_dense04b(2),
}


def on_meta(config) -> QueritForSequenceClassification:
    with torch.device("meta"):
        return QueritForSequenceClassification(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_operations_of_a_token_are_those_that_torch_counts(name):
    config = CONFIGS[name]()
    model = on_meta(config).eval()
    tokens = 48
    with FlopCounterMode(display=False) as counted, torch.device("meta"), torch.no_grad():
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), position_ids=torch.zeros(1, tokens).long())
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    products = 2 * shapes.linear_parameters(config) * tokens
    assert counted.get_total_flops() == products + 4 * width * config.num_hidden_layers * tokens**2


def test_the_shapes_have_the_published_sizes():
    """The numbers of parameters that the publishers state."""
    assert sum(p.numel() for p in on_meta(shapes.config_4b()).parameters()) == 4_021_782_018
    mixture = on_meta(shapes.config_a04b())
    assert sum(p.numel() for p in mixture.parameters()) == pytest.approx(4_919_641_986, rel=1e-3)
    embeddings = mixture.model.get_input_embeddings().weight.numel()
    assert shapes.linear_parameters(shapes.config_a04b()) + embeddings == pytest.approx(433.8e6, rel=1e-3)
    dense = shapes.linear_parameters(shapes.config_dense04b())
    assert dense == pytest.approx(shapes.linear_parameters(shapes.config_a04b()), rel=0.01)


def test_the_page_says_what_the_results_say():
    assert (report.RESULTS / "README.md").read_text(encoding="utf-8") == report.report()
