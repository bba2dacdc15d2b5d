"""Writing queries for documents: cut out of them, by a local language model, or by an OpenAI-compatible server.

A generator is an entry of `generators` in recipes.mine's YAML: its `kind` and the fields of that kind's settings below.
Each has a method `queries(items) -> one list of (kind, query, why dropped or "") per item`; an item is a document with
`id`, `title`, `text` and `language`. Of a document that a server refuses, REFUSED is why, and its words are the query.
"""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from querit.text import joined
from recipes.lib.crops import CropGenerator
from recipes.lib.documents import stable_hash
from recipes.lib.queries import kind_of, read_answer, why_dropped

PROMPTS = Path(__file__).with_name("prompts")
Queries = list[tuple[str, str, str]]
REFUSED = "refused"
ALIKE = 8  # so many documents are not all refused for what they say


@dataclass
class CropSettings:
    pass


@dataclass
class LocalSettings:
    model: str = field(metadata={"help": "Causal language model with a chat template: folder or Hub id."})
    revision: str | None = field(default=None, metadata={"help": "Commit of a model from the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file of that folder or repo to read."})
    prompts: str = field(default=str(PROMPTS), metadata={"help": "Folder of <language>.txt and other.txt."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the weights; float32 suits older CPUs."})
    batch_size: int = field(default=8, metadata={"help": "Documents answered at once."})
    document_tokens: int = field(default=512, metadata={"help": "Documents are cut to this many tokens."})
    new_tokens: int = field(default=160, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 takes the likeliest token."})
    top_p: float = field(default=0.95, metadata={"help": "Sampling keeps the likeliest tokens up to this probability."})


@dataclass
class OpenAISettings:
    model: str = field(metadata={"help": "Name of the model at the server."})
    base_url: str | None = field(default=None, metadata={"help": "The server's URL, up to /v1; OpenAI's if not given."})
    api_key_env: str | None = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the key; null for no key."}
    )
    prompts: str = field(default=str(PROMPTS), metadata={"help": "Folder of <language>.txt and other.txt."})
    document_characters: int = field(default=8000, metadata={"help": "Documents are cut to this many characters."})
    new_tokens: int = field(default=4096, metadata={"help": "Longest answer in tokens, reasoning included."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    concurrency: int = field(default=8, metadata={"help": "Requests under way at once, of each worker."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "Limit of each worker's requests."})
    max_retries: int = field(default=6, metadata={"help": "Tries after the first where the server fails or is busy."})
    timeout: float = field(default=600, metadata={"help": "Seconds to wait for one answer."})


SETTINGS: dict[str, type] = {"crop": CropSettings, "local": LocalSettings, "openai": OpenAISettings}


def read_settings(entry: dict) -> CropSettings | LocalSettings | OpenAISettings:
    """The settings of one entry of `generators`. ValueError for an unknown kind or key, or a key that is missing."""
    keys = {key: value for key, value in entry.items() if key != "kind"}
    if entry.get("kind") not in SETTINGS:
        raise ValueError(f"A generator's kind is {entry.get('kind')!r}; it must be one of {', '.join(SETTINGS)}.")
    settings = SETTINGS[entry["kind"]]
    try:
        return settings(**keys)
    except TypeError as error:
        known = [f.name for f in fields(settings)]
        raise ValueError(f"Generator {entry['kind']}: {error}. Its keys are {known}.") from error


def name_of(entry: dict) -> str:
    return entry["kind"] if "model" not in entry else f"{entry['kind']}:{Path(entry['model']).name}"


def read_prompt(folder: str, language: str) -> list[str]:
    """The messages of a language's prompt file, user and assistant in turn, parted by lines of `---`.

    The last one holds {document}; {count} is the number of queries. A language without a file gets other.txt.
    """
    path = Path(folder) / f"{language}.txt"
    path = path if path.exists() else path.with_name("other.txt")
    text = path.read_text(encoding="utf-8")
    messages = [part.strip() for part in re.split(r"^---$", text, flags=re.MULTILINE)]
    if len(messages) % 2 == 0 or "{document}" not in messages[-1]:
        raise ValueError(
            f"{path}: the last message must be the user's (parts are user, assistant, ... user) with {{document}}."
        )
    return messages


def conversation(messages: list[str], document: str, count: int) -> list[dict[str, str]]:
    # The document comes in last: what it says in braces stays as it is.
    filled = [message.replace("{count}", str(count)).replace("{document}", document) for message in messages]
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(filled)]


def answers_to_queries(answer: str, messages: list[str], count: int, finished: bool) -> Queries:
    prompt = "\n".join(messages).replace("{count}", str(count))
    lines, kept = [], 0
    for query, dropped in read_answer(answer, prompt, finished):
        kept += not dropped
        lines.append((kind_of(query), query, dropped or ("surplus" if kept > count else "")))
    return lines


class LocalGenerator:
    """A causal language model through transformers. Its sampling is seeded by the documents of a batch."""

    def __init__(self, settings: LocalSettings, count: int, seed: int):
        import torch  # here: cutting crops needs neither torch nor transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        self.settings, self.count, self.seed = settings, count, seed
        source: dict = {"revision": settings.revision or "main"}
        if settings.gguf_file:
            source["gguf_file"] = settings.gguf_file
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left", **source)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if settings.gguf_file:
            # Unpacked: which kernels for packed weights there are, and so the answers, would depend on the machine.
            source["quantization_config"] = GgufConfig(dequantize=True)
        self.model = cast(Any, AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, **source))
        self.model.to(device).eval()

    def prompt(self, item: dict) -> tuple[str, list[str]]:
        """-> (the prompt as the model reads it, the messages it is made from)."""
        messages = read_prompt(self.settings.prompts, item["language"])
        text = joined(item)[: 20 * self.settings.document_tokens]  # tokenizing a whole book to cut it is slow
        cut = self.tokenizer(
            text, truncation=True, max_length=self.settings.document_tokens, add_special_tokens=False,
            return_offsets_mapping=True,
        )["offset_mapping"]  # fmt: skip
        turns = conversation(messages, text[: cut[-1][1]] if cut else text, self.count)
        if self.tokenizer.chat_template is None:
            return "\n\n".join(turn["content"] for turn in turns) + "\n", messages
        # Templates of reasoning models read enable_thinking, others leave it alone.
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(rendered), messages

    def answers(self, prompts: list[str], seed: int) -> list[tuple[str, bool]]:
        """(answer, whether it came to its end) of each prompt."""
        import torch

        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        sampling: dict = {"do_sample": False}
        if self.settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p}
        torch.manual_seed(seed)
        with torch.inference_mode():
            outputs = self.model.generate(
                **inputs.to(self.model.device), max_new_tokens=self.settings.new_tokens,
                pad_token_id=self.tokenizer.pad_token_id, **sampling,
            )  # fmt: skip
        written = outputs[:, inputs["input_ids"].shape[1] :].cpu()
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends).reshape(-1)
        finished = torch.isin(written, ends).any(1).tolist()
        return list(zip(self.tokenizer.batch_decode(written, skip_special_tokens=True), finished, strict=True))

    def queries(self, items: list[dict]) -> list[Queries]:
        made = [self.prompt(item) for item in items]
        order = sorted(range(len(items)), key=lambda i: len(made[i][0]))  # little padding
        found: dict[int, Queries] = {}
        for start in range(0, len(order), self.settings.batch_size):
            batch = order[start : start + self.settings.batch_size]
            seed = stable_hash(self.seed, *(items[i]["id"] for i in batch))
            for i, (answer, finished) in zip(batch, self.answers([made[i][0] for i in batch], seed), strict=True):
                found[i] = answers_to_queries(answer, made[i][1], self.count, finished)
        return [found[i] for i in range(len(items))]


def all_refused(server: str, documents: int, reason: str) -> ValueError:
    return ValueError(
        f"{server} refused each of the first {documents} documents ({reason}). Correct the generator's settings."
    )


class OpenAIGenerator:
    """A server that speaks OpenAI's chat completions: vLLM, DeepSeek, OpenAI, llama.cpp."""

    def __init__(self, settings: OpenAISettings, count: int, seed: int):
        try:
            import openai
        except ImportError as error:
            raise ImportError("The generator is openai, which is not installed: pip install openai") from error

        self.settings, self.count, self.seed = settings, count, seed
        self.key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else "none"
        if not self.key:
            raise ValueError(
                f"The environment variable {settings.api_key_env} is not set; it must hold the server's key."
            )
        self.openai, self.answered = openai, False
        self.client = openai.OpenAI(
            api_key=self.key, base_url=settings.base_url, max_retries=settings.max_retries, timeout=settings.timeout
        )
        self.lock, self.next_start = threading.Lock(), 0.0

    def wait_for_turn(self) -> None:
        """Space the requests evenly, over shards too."""
        if self.settings.requests_per_minute is None:
            return
        with self.lock:
            start = max(self.next_start, time.monotonic())
            self.next_start = start + 60 / self.settings.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))

    def ask(self, item: dict) -> Queries:
        messages = read_prompt(self.settings.prompts, item["language"])
        turns = conversation(messages, joined(item)[: self.settings.document_characters], self.count)
        self.wait_for_turn()
        try:
            completion = self.client.chat.completions.create(
                model=self.settings.model,
                messages=turns,  # type: ignore[arg-type]
                temperature=self.settings.temperature,
                max_tokens=self.settings.new_tokens,
                seed=stable_hash(self.seed, item["id"]) % 2**31,
            )
        except self.openai.OpenAIError as error:
            reason = f"{type(error).__name__}: {error}".replace(self.key, "...")
            if isinstance(error, self.openai.BadRequestError):  # a content filter, or too long a document
                return [("", reason, REFUSED)]
            status = getattr(error, "status_code", 500)  # none where there was no connection
            tried = f"gave no answer in {self.settings.max_retries + 1} tries"
            if status < 500 and status not in (408, 409, 429):  # the client does not try again
                tried = "takes no requests of this kind"
            raise RuntimeError(
                f"{self.client.base_url} {tried} ({reason}). What is finished is kept: run the stage again once "
                "it answers."
            ) from None  # the client's own error may quote the key
        choice = completion.choices[0]
        finished = choice.finish_reason != "length"
        return answers_to_queries(choice.message.content or "", messages, self.count, finished)

    def queries(self, items: list[dict]) -> list[Queries]:
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            found = list(pool.map(self.ask, items))
        refused = [reason for queries in found for _, reason, dropped in queries if dropped == REFUSED]
        self.answered = self.answered or len(refused) < len(items)
        if not self.answered and len(items) >= ALIKE:
            raise all_refused(str(self.client.base_url), len(items), refused[0])
        return found


class QueryWriter:
    """A worker of `run_shards`: documents in, the queries written for them out, each with why it is dropped."""

    def __init__(self, entry: dict, count: int, seed: int, term_table: str):
        settings = read_settings(entry)
        self.crop = isinstance(settings, CropSettings)
        self.generator: CropGenerator | LocalGenerator | OpenAIGenerator
        if isinstance(settings, CropSettings):
            self.generator = CropGenerator(count, term_table)
        elif isinstance(settings, LocalSettings):
            self.generator = LocalGenerator(settings, count, seed)
        else:
            self.generator = OpenAIGenerator(settings, count, seed)

    def __call__(self, items: list[dict]) -> list[dict]:
        kept = ("row", "id", "language", "aside")
        return [
            {**{key: item[key] for key in kept}, "kind": kind, "text": query}
            | {"dropped": dropped or why_dropped(query, item, self.crop)}
            for item, queries in zip(items, self.generator.queries(items), strict=True)
            for kind, query, dropped in queries
        ]
