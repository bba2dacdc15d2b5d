"""What the benchmarks count, and that their page says what their results say."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from tests.bench import report, shapes
from tests.bench.bench_scoring import useful_operations, works

CONFIGS = {
    "nano": lambda: AutoConfig.from_pretrained(shapes.NANO, trust_remote_code=False),
    "0.6B": lambda: shapes.config_06b(2),
    "4B": lambda: shapes.config_4b(1),
    "dense 0.4B": lambda: shapes.config_dense04b(2),
}


def on_meta(config) -> QueritForSequenceClassification:
    with torch.device("meta"):
        return QueritForSequenceClassification(config)


def counted(model: QueritForSequenceClassification, tokens: int) -> int:
    """Of the layers: a pooler, like a head, runs once a pair."""
    device = next(model.parameters()).device
    model.model.pooler = None
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, device, torch.no_grad():
        model.model(input_ids=ids, position_ids=ids)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_operations_of_a_token_are_those_that_torch_counts(name):
    config = CONFIGS[name]()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    products = 2 * shapes.linear_parameters(config) * 48
    assert counted(on_meta(config).eval(), 48) == products + 4 * width * config.num_hidden_layers * 48**2


def test_of_a_mixture_the_experts_that_a_token_goes_to_count():
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 96, "moe_intermediate_size": 24}
    config = shapes.config_a04b(3)
    config.update(small | {"n_routed_experts": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8})
    model = QueritForSequenceClassification(config).eval()
    model.set_experts_implementation("eager")
    # The part that grows with the square of the tokens is attention's.
    products = 2 * counted(model, 20) - counted(model, 40) / 2
    assert products == 2 * 20 * shapes.linear_parameters(config)


def test_useful_operations_are_those_of_each_pair_by_itself():
    requests = [("two words", ["a short one", "a document that is somewhat longer"]), ("and another", ["one"])]
    model = on_meta(AutoConfig.from_pretrained(shapes.NANO, trust_remote_code=False)).eval()
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(shapes.NANO), 256)
    lengths = [pair.num_tokens for query, documents in requests for pair in encoder.encode(query, documents)]
    tokens, operations = useful_operations(shapes.NANO, requests)
    assert tokens == sum(lengths)
    assert operations == sum(counted(model, length) for length in lengths)


def test_a_prompt_that_can_be_shared_is_useful_once(tmp_path):
    folder = shapes.write_folder(tmp_path / "model", small_causal())
    one, both = ([("a question", documents)] for documents in (["first document"], ["first document", "the second"]))
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(folder), shapes.MAX_LENGTH)
    second = encoder.encode("a question", ["the second"])[0]
    alone, together = useful_operations(folder, one)[0], useful_operations(folder, both)[0]
    assert together - alone == second.num_tokens - len(second.prefix) < second.num_tokens


@pytest.mark.parametrize("nano", [True, False])
def test_no_work_is_cut(nano):
    most = 256 if nano else shapes.MAX_LENGTH
    assert all(work.query + work.longest + 10 <= most for work in works(nano).values())


def small_causal() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_670, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip


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
