import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from recipes.lib.crops import CropGenerator, count_terms, split_sentences, term_slot
from recipes.lib.generators import (
    ALIKE,
    PROMPTS,
    REFUSED,
    LocalGenerator,
    OpenAIGenerator,
    QueryWriter,
    conversation,
    read_prompt,
    read_settings,
)
from recipes.lib.queries import answer_lines, kind_of, normalise, read_answer, why_dropped, word_count
from tests.models_for_tests import tiny_config, tokenizer_of

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
KETTLE = "Limescale settles in every kettle. Boil vinegar in it and rinse it twice. Then it is clean."


def item(text, language="en", title="", key="d1"):
    return {"row": 0, "id": key, "title": title, "text": text, "language": language, "aside": False}


ITEMS = [item(f"{KETTLE} Number {n}." * (n + 1), key=f"d{n}") for n in range(5)]


# answers


@pytest.mark.parametrize(
    "answer",
    [
        "kettle limescale\nHow do I clean a kettle?\nI need a way to clean my kettle.",
        '1. kettle limescale\n2) "How do I clean a kettle?"\n3: I need a way to clean my kettle.',
        "- **kettle limescale**\n\n* How do I clean a kettle?\n• «I need a way to clean my kettle.»",
        "Keywords: kettle limescale\nQuestion: How do I clean a kettle?\nRequest：I need a way to clean my kettle.",
        '```json\n["kettle limescale", "How do I clean a kettle?", "I need a way to clean my kettle."]\n```',
        '{"queries": [{"query": "kettle limescale"}, "How do I clean a kettle?", "I need a way to clean my kettle."]}',
        '[\n "kettle limescale",\n "How do I clean a kettle?",\n "I need a way to clean my kettle."',
        "<think>1. A user may\nask much.</think>\nkettle limescale\nHow do I clean a kettle?\n"
        "I need a way to clean my kettle.",
        "So they want three.\n</think>\n\nkettle limescale\nHow do I clean a kettle?\nI need a way to clean my kettle.",
    ],
)
def test_queries_are_read_however_they_are_dressed(answer):
    expected = ["kettle limescale", "How do I clean a kettle?", "I need a way to clean my kettle."]
    assert [line.strip(".") for line in answer_lines(answer)] == [line.strip(".") for line in expected]


@pytest.mark.parametrize(
    ("line", "query"),
    [
        ("Mots-clés : bouilloire calcaire", "bouilloire calcaire"),
        ("Suchanfrage 2: Wasserkocher entkalken", "Wasserkocher entkalken"),
        ("1、关键词：水壶 除垢", "水壶 除垢"),
        ("質問：やかんの水垢はどう取りますか", "やかんの水垢はどう取りますか"),
        ("2024 tide table", "2024 tide table"),
        ("3D printer nozzle", "3D printer nozzle"),
        ("C++: what is a pointer", "C++: what is a pointer"),
    ],
)
def test_labels_and_numbers_go_and_content_stays(line, query):
    assert answer_lines(line) == [query]


def test_reasoning_that_never_ends_gives_no_query():
    assert answer_lines("<think>\nkettle limescale\nperhaps") == []


def test_echoes_and_cut_lines_are_marked():
    prompt = "Write 3 search queries.\nText: A cast iron pan.\n---\ncast iron pan rust\n"
    answer = "Here are the queries:\nWrite 3 search queries.\nCast iron pan rust\niron pan\nhow do I cl"
    dropped = [reason for _, reason in read_answer(answer, prompt, finished=False)]
    assert dropped == ["echo", "echo", "echo", "", "cut"]
    assert read_answer(answer, prompt)[-1] == ("how do I cl", "")


@given(st.text())
def test_no_answer_breaks_the_reader(answer):
    for query, _ in read_answer(answer, "prompt", finished=False):
        assert query == query.strip() != "" and "\n" not in query
        kind_of(query), word_count(query), normalise(query)


def test_filters_name_their_reason():
    document = item(KETTLE, title="Kettles")
    assert why_dropped("clean a kettle with vinegar", document, crop=False) == ""
    assert why_dropped("a", document, crop=False) == why_dropped("??", document, crop=False) == "too_short"
    assert why_dropped("kettle " * 65, document, crop=False) == "too_long"
    copied = "Boil VINEGAR in it, and rinse it twice"
    assert why_dropped(copied, document, crop=False) == "copy"
    assert why_dropped(copied, document, crop=True) == ""
    assert why_dropped(KETTLE.upper(), document, crop=True) == "copy"
    assert why_dropped("Wie entferne ich den Kalk aus meinem Wasserkocher?", document, crop=False) == "language"
    chinese = item("水壶里会积水垢。倒入白醋煮沸，然后用清水冲洗两遍就干净了。", "zh")
    assert why_dropped("倒入白醋煮沸，然后用清水冲洗两遍", chinese, crop=False) == "copy"
    assert why_dropped("白醋煮沸", chinese, crop=False) == ""


# crops


@pytest.fixture(scope="module")
def term_table(tmp_path_factory):
    common = [
        "The weather is fine today and it is warm.",
        "The bread is good today.",
        "It is late and the shop is shut.",
    ]
    common += ["今天的天气很好。我们去公园。", "今日は天気がいいので公園に行きます。"]
    path = tmp_path_factory.mktemp("terms") / "terms.npy"
    np.save(path, count_terms(common * 20))
    return str(path)


def test_term_counts_are_document_frequencies():
    table = count_terms(["a kettle, a kettle", "the kettle 水壶很", "水壶"])
    found = {term: table[term_slot(term)] for term in ("kettle", "a", "水壶", "壶很")}
    assert found == {"kettle": 2, "a": 1, "水壶": 2, "壶很": 1} and table[-1] == 3


def test_crops_are_title_keywords_telling_sentences_and_headings(term_table):
    text = (
        "## Limescale\n\nThe weather is fine today. Vinegar dissolves limescale in a kettle. It is late and warm. "
        "Then it is good today.\n\n## Rinsing twice\n\nThe shop is shut."
    )
    queries = CropGenerator(6, term_table).crops(item(text, title="Kettle care"))
    kinds = dict(zip([kind for kind, _, _ in queries], [query for _, query, _ in queries], strict=True))
    assert [kind for kind, _, _ in queries] == ["title", "keywords", "sentence", "heading", "sentence", "heading"]
    assert queries[0][1] == "Kettle care" and kinds["heading"] == "Rinsing twice" and queries[3][1] == "Limescale"
    assert queries[2][1] == "Vinegar dissolves limescale in a kettle"
    assert set(queries[1][1].split()) <= {"Limescale", "Vinegar", "dissolves", "kettle", "Rinsing", "twice"}
    assert CropGenerator(2, term_table).crops(item(text, title="Kettle care")) == queries[:2]


def test_crops_of_text_without_spaces(term_table):
    chinese = item("今天的天气很好，我们去公园。烧水壶里的水垢可以用白醋煮沸清除。天气很好。", "zh")
    (sentence, *_) = CropGenerator(3, term_table).crops(chinese)
    assert sentence == ("sentence", "烧水壶里的水垢可以用白醋煮沸清除", "")
    japanese = item(
        "今日は天気がいいです。やかんの水垢はクエン酸で落とせます。電気ポットも同じ方法で掃除できます。", "ja"
    )
    crops = {kind: query for kind, query, _ in CropGenerator(2, term_table).crops(japanese)}
    assert set(crops["keywords"].split()) <= {"水垢", "クエン", "電気", "ポット", "方法", "掃除", "同じ"}
    assert "天気" not in crops["sentence"]


def test_a_crop_is_a_span_of_its_document(term_table):
    text = "A very long sentence about kettles goes on, " + ", ".join(f"with clause number {n} of it" for n in range(9))
    spans = split_sentences(text + ".")
    assert len(spans) > 5 and all(span in text for span in spans)
    assert all(4 <= word_count(span) <= 24 for span in spans)


# prompts and settings


@pytest.mark.parametrize("language", ["en", "de", "fr", "es", "ru", "zh", "ja", "ko", "other"])
def test_prompts_hold_the_document_whatever_it_says(language):
    messages = read_prompt(str(PROMPTS), language)
    turns = conversation(messages, "{count} {document} \\1", 7)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"][: len(messages)]
    assert "{count} {document} \\1" in turns[-1]["content"] and len(turns) == len(messages)
    assert "7" in turns[0]["content"] and "{" not in "".join(turn["content"] for turn in turns[:-1])


def test_a_language_without_a_prompt_gets_the_general_one(tmp_path):
    assert read_prompt(str(PROMPTS), "it") == read_prompt(str(PROMPTS), "other")
    (tmp_path / "other.txt").write_text("a\n---\n{document}")
    with pytest.raises(ValueError, match="the last message must be the user's"):
        read_prompt(str(tmp_path), "it")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "llm"}, "it must be one of crop, local, openai"),
        ({"kind": "local"}, "missing.*model"),
        ({"kind": "openai", "model": "m", "api_key": "x"}, "unexpected.*api_key.*Its keys are"),
    ],
)
def test_wrong_settings_are_told(entry, message):
    with pytest.raises(ValueError, match=message):
        read_settings(entry)


# a local model


def chat_tokenizer(folder):
    tokenizer_of("qwen3").save_pretrained(folder)  # another object, whose template may be changed
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = chat_tokenizer(folder)
    torch.manual_seed(0)
    config = tiny_config("qwen3", eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def local(model, **changes):
    entry = {"kind": "local", "model": model, "dtype": "float32", "new_tokens": 24, "batch_size": 2, **changes}
    return LocalGenerator(read_settings(entry), count=3, seed=0)


def test_local_answers_depend_on_the_documents_alone(causal_model):
    generator = local(causal_model)
    first = generator.queries(ITEMS)
    torch.rand(7)  # what came before does not matter
    assert generator.queries(ITEMS) == first == local(causal_model).queries(ITEMS)
    assert len(first) == len(ITEMS) and any(first)
    assert len({str(queries) for queries in first}) > 1
    other = LocalGenerator(generator.settings, count=3, seed=1)
    assert other.queries(ITEMS) != first


def test_local_greedy_answers_are_those_of_plain_generation(causal_model):
    generator = local(causal_model, temperature=0, batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(causal_model, dtype=torch.float32)
    prompts = [generator.prompt(item)[0] for item in ITEMS[:3]]
    assert prompts[0].startswith("<|im_start|>user\nText: To keep") and prompts[0].endswith("assistant\n")
    for prompt, (answer, finished) in zip(prompts, generator.answers(prompts, 0), strict=True):
        ids = generator.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer == generator.tokenizer.decode(alone, skip_special_tokens=True)
        assert finished == (generator.tokenizer.eos_token_id in alone.tolist())


def test_local_documents_are_cut_by_tokens(causal_model):
    generator = local(causal_model, document_tokens=20)
    long = item("zebra " * 500)
    prompt, _ = generator.prompt(long)
    whole, _ = local(causal_model, document_tokens=5000).prompt(long)
    tokens = len(generator.tokenizer("zebra " * prompt.count("zebra"), add_special_tokens=False)["input_ids"])
    assert whole.count("zebra") == 500 and prompt.count("zebra") >= 1 and tokens <= 21


def write_gguf(path, model, tokenizer):
    """A llama model and its byte-level BPE in llama.cpp's format: Q and K rows stand in another order there."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if added.get(i) else 4 if i in added else 1 for i in range(len(pieces))])
    merges = spec["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q"}
    names |= {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                rows, columns = values.shape
                values = values.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name.replace("model.layers", "blk"), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_local_reads_gguf(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    (tmp_path / "packed").mkdir()
    write_gguf(tmp_path / "packed" / "tiny.gguf", model, tokenizer)
    generator = local(str(tmp_path / "packed"), gguf_file="tiny.gguf", temperature=0)
    (prompt, _) = generator.prompt(ITEMS[0])
    assert prompt.startswith("<|im_start|>user\nText: To keep") and prompt.endswith("<|im_start|>assistant\n")
    ids = generator.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert generator.tokenizer.decode(ids[0]) == prompt and ids[0, 0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    with torch.inference_mode():
        assert torch.allclose(generator.model(ids).logits, model(ids).logits, atol=1e-4)
    assert len(generator.queries(ITEMS)) == len(ITEMS)


# a server


class Server(ThreadingHTTPServer):
    def __init__(self, statuses=(), answer="<think>Hm.</think>\n1. kettle limescale\n2. How do I clean a kettle?"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses, self.answer, self.requests, self.lock = list(statuses), answer, [], threading.Lock()
        self.finish_reason = "stop"
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers["authorization"], body))
            status = self.server.statuses.pop(0) if self.server.statuses else 200
        content = self.server.answer(body["messages"]) if callable(self.server.answer) else self.server.answer
        status = content if isinstance(content, int) else status
        message = {"role": "assistant", "content": content, "reasoning_content": "no query"}
        choice = {"index": 0, "message": message, "finish_reason": self.server.finish_reason}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        if status != 200:
            answer = {"error": {"message": f"bad luck with {self.headers['authorization']}"}}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("QUERIT_TEST_KEY", "sk-very-secret")
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def entry_of(server, **changes):
    return {"kind": "openai", "model": "r1", "base_url": server.base_url, "api_key_env": "QUERIT_TEST_KEY", **changes}


def remote(server, **changes):
    return OpenAIGenerator(read_settings(entry_of(server, **changes)), count=2, seed=0)


def test_a_server_that_fails_at_first_is_asked_again(serve):
    server = serve([429, 500, 503])
    found = remote(server, concurrency=2).queries(ITEMS)
    assert found == [[("keywords", "kettle limescale", ""), ("question", "How do I clean a kettle?", "")]] * len(ITEMS)
    assert len(server.requests) == len(ITEMS) + 3
    path, key, body = server.requests[-1]
    assert path == "/v1/chat/completions" and key == "Bearer sk-very-secret" and body["model"] == "r1"
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    seeds = {body["messages"][-1]["content"]: body["seed"] for _, _, body in server.requests}
    assert len(set(seeds.values())) == len(ITEMS)


def test_a_server_that_keeps_failing_is_named_and_the_key_is_not(serve):
    server = serve([500] * 50)
    with pytest.raises(RuntimeError, match=r"gave no answer in 3 tries.*run the stage again") as caught:
        remote(server, max_retries=2, concurrency=1).queries(ITEMS[:1])
    assert server.base_url in str(caught.value) and "sk-very-secret" not in str(caught.value)
    assert caught.value.__suppress_context__ and len(server.requests) == 3


@pytest.mark.parametrize(("status", "name"), [(401, "AuthenticationError"), (404, "NotFoundError")])
def test_what_is_not_tried_again_is_not_said_to_have_been(serve, status, name):
    server = serve([status] * 9)
    with pytest.raises(RuntimeError, match=f"takes no requests of this kind .{name}: .*bad luck") as caught:
        remote(server, concurrency=1).queries(ITEMS[:1])
    assert "tries" not in str(caught.value) and "sk-very-secret" not in str(caught.value) and len(server.requests) == 1


def test_a_document_that_the_server_refuses_gets_no_query(serve):
    server = serve(answer=lambda messages: 400 if "Number 3" in messages[-1]["content"] else "kettle limescale")
    found = remote(server).queries(ITEMS)
    assert [found[n] for n in (0, 1, 2, 4)] == [[("keywords", "kettle limescale", "")]] * 4
    ((_, reason, dropped),) = found[3]
    assert dropped == REFUSED and "bad luck with Bearer ..." in reason and len(server.requests) == len(ITEMS)
    assert [row["dropped"] for row in QueryWriter(entry_of(server), 2, 0, "")(ITEMS[3:])] == [REFUSED, ""]


def test_a_server_that_refuses_all_of_the_first_documents_is_quoted(serve):
    documents = [item(KETTLE, key=f"d{n}") for n in range(ALIKE)]
    server = serve(answer=lambda messages: 400)
    generator = remote(server)
    assert all(queries[0][2] == REFUSED for queries in generator.queries(documents[1:]))  # they may all be bad
    with pytest.raises(ValueError, match=f"refused each of the first {ALIKE} documents .BadRequestError.*bad luck"):
        generator.queries(documents)
    server.answer = "kettle limescale"
    generator.queries(documents[:1])
    server.answer = lambda messages: 400  # it has answered, so it takes what it is sent
    assert all(queries[0][2] == REFUSED for queries in generator.queries(documents))


def test_long_documents_are_cut_by_characters(serve):
    server = serve()
    remote(server, document_characters=30).queries([item("b" * 50, title="a" * 20)])
    (turn,) = [m for m in server.requests[0][2]["messages"] if "bbbb" in m["content"]]
    assert "a" * 20 + " " + "b" * 9 in turn["content"] and "b" * 10 not in turn["content"]


class Clock:
    """Time in place of the module: it passes only in sleep."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_requests_keep_to_their_rate(serve, monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr("recipes.lib.generators.time", clock)
    server = serve(answer=lambda messages: asked.append(clock.now) or "kettle limescale")
    generator = remote(server, requests_per_minute=30, concurrency=1)
    generator.queries(ITEMS[:3])
    generator.queries(ITEMS[3:])  # another shard
    clock.now = 300.0
    generator.queries(ITEMS[:2])
    assert asked == [100, 102, 104, 106, 108, 300, 302]
    remote(server, concurrency=1).queries(ITEMS)  # without a limit
    assert asked[7:] == [302] * len(ITEMS)


def test_a_missing_key_is_named(serve, monkeypatch):
    monkeypatch.delenv("QUERIT_TEST_KEY")
    server = serve()
    with pytest.raises(ValueError, match="QUERIT_TEST_KEY is not set"):
        remote(server)
    remote(server, api_key_env=None).queries(ITEMS[:1])
    assert server.requests[0][1] == "Bearer none"


def test_rows_hold_what_was_written_and_why_it_is_dropped(serve):
    server = serve(answer="kettle limescale\nHow do I clean a kettle?\none more query\nNo numbers, no explanations.")
    entry = entry_of(server)
    rows = QueryWriter(entry, 2, 0, "")([ITEMS[1]])
    assert [(row["text"], row["dropped"]) for row in rows] == [
        ("kettle limescale", ""),
        ("How do I clean a kettle?", ""),
        ("one more query", "surplus"),
        ("No numbers, no explanations.", "echo"),
    ]
    assert all(row["id"] == "d1" and row["language"] == "en" for row in rows)
    server.finish_reason = "length"
    assert [row["dropped"] for row in QueryWriter(entry, 4, 0, "")([ITEMS[1]])] == ["", "", "", "echo"]
    server.answer = "kettle limescale\nHow do I cl"
    assert [row["dropped"] for row in QueryWriter(entry, 4, 0, "")([ITEMS[1]])] == ["", "cut"]
