"""Checks of a release folder, before it is published or used: `querit verify FOLDER`.

The folder's own code runs only once all else is found right, the code itself included: it is the package's.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

import modeling_querit
from hub_card.build import HANDLER, RESULTS_FOLDER, SUMS, file_sum, files_of, results_of
from hub_card.convert import (
    CHAT_TEMPLATE,
    NO_LABELS,
    TOKENIZER_FILES,
    expected_shapes,
    read_headers,
    read_tensor,
    weight_files,
)
from hub_card.engines import ENGINES
from hub_card.probes import PROBES_FILE, read_probes
from hub_card.provenance import MERGE_RECORD, RELIABILITY
from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import POOLER_MODEL_TYPE, REMOTE_CODE, remote_code_config

TOLERANCE = 1e-3  # of scores in [-1, 1], float32 on another machine than the builder's
NEEDED = {"README.md", "LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json"}
NEEDED |= {PROBES_FILE, HANDLER.name, *REMOTE_CODE}
OTHERS = {*TOKENIZER_FILES, CHAT_TEMPLATE.name, MERGE_RECORD, RELIABILITY, "NOTICE"}
OTHERS |= {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
PATTERNS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    rf"|1_Pooling/config\.json|2_Dense/(config\.json|model\.safetensors)|{re.escape(RESULTS_FOLDER)}/[\w.-]+\.yaml"
)
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".keras"}
CODE = {".py", ".pyc", ".so", ".sh", ".dll", ".dylib", ".exe", ".ipynb"}
AGAIN = "Build the folder again with `querit build`."
CARD_KEYS = ("license", "library_name", "pipeline_tag")


def verify(folder: str | Path) -> list[str]:
    """The problems of a release folder, each naming its fix; an empty list for a good one. Nothing is changed."""
    return [problem for _, problems in report(folder) for problem in problems]


def report(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(what is checked, its problems), check by check. The engines come last, and only where all else is right."""
    folder = Path(folder)
    if not folder.is_dir():
        yield "folder", [f"{folder} is no folder. Make one with `querit build`."]
        return
    sound = True
    for name, check in CHECKS.items():
        problems = list(check(folder))
        sound &= not problems
        yield name, problems
    if not sound:
        return
    for name in ENGINES:
        yield name, check_engine(folder, name)


def check_sums(folder: Path) -> Iterator[str]:
    if not (folder / SUMS).is_file():
        yield f"{SUMS} is missing. {AGAIN}"
        return
    listed = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not found:
            yield f"{SUMS} has the line {line[:80]!r}, which is no hash and name. {AGAIN}"
            return
        listed[found[2]] = found[1]
    there = files_of(folder)
    for path in sorted(listed.keys() - set(there)):
        yield f"{path} is missing. Download it again, or build the folder again."
    for path in there:
        if path not in listed:
            yield f"{path} is not in {SUMS}. Remove it, or build the folder again."
        elif not (folder / path).is_file():
            yield f"{path} is a broken link. Download it again."
        elif file_sum(folder / path) != listed[path]:
            yield f"{path} is not what was built: its hash differs. Download it again, or build the folder again."


def check_kinds(folder: Path) -> Iterator[str]:
    there = files_of(folder)
    for path in sorted(NEEDED - set(there)):
        yield f"{path} is missing: a release has it. {AGAIN}"
    for path in there:
        if path in NEEDED or path in OTHERS or PATTERNS.fullmatch(path):
            continue
        suffix = Path(path).suffix.lower()
        if suffix in PICKLES:
            yield f"{path} may hold a pickle, which can run code when it is loaded. Remove it: safetensors only."
        elif suffix in CODE:
            yield f"{path} is code that is not Querit's. It was not run. Remove it."
        else:
            yield f"{path} is no file of a release. Remove it."


def check_code(folder: Path) -> Iterator[str]:
    package = Path(modeling_querit.__file__).parent
    for source in (*(package / name for name in REMOTE_CODE), HANDLER):
        path = folder / source.name
        if path.is_file() and path.read_bytes() != source.read_bytes():
            yield f"{path.name} is not the installed package's, and was not run. {AGAIN}"
    for name, wanted in (("config.json", remote_code_config()), ("tokenizer_config.json", {})):
        config = read_json(folder / name)
        for key in ("auto_map", "custom_pipelines"):
            if config.get(key) != wanted.get(key):
                yield f"{name} names other code under {key} than Querit's; it was not run. {AGAIN}"


def check_weights(folder: Path) -> Iterator[str]:
    try:
        expected = expected_shapes(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        found, _ = read_headers(weight_files(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{error}"
        return
    for key in sorted(expected.keys() - found.keys()):
        yield f"the weights lack {key}, which config.json asks for. {AGAIN}"
    for key in sorted(found.keys() - expected.keys()):
        yield f"the weights have {key}, which this architecture does not. {AGAIN}"
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            yield f"{key} has the shape {[*found[key]]}; config.json asks for {[*expected[key]]}. {AGAIN}"


def check_labels(folder: Path) -> Iterator[str]:
    """What config.json says to engines that know the backbone and not our code."""
    config = read_json(folder / "config.json")
    if config.get("model_type") == POOLER_MODEL_TYPE:
        if config.get("architectures") != ["BertForSequenceClassification"] or len(config.get("id2label", {})) != 1:
            yield f"config.json must be of a BertForSequenceClassification with one label, for other engines. {AGAIN}"
    elif any(config.get(key) != value for key, value in NO_LABELS.items()) or "num_labels" in config:
        yield f"config.json has labels: an engine that does not know the head would rank by random weights. {AGAIN}"


def check_modules(folder: Path) -> Iterator[str]:
    """The modules for sentence-transformers, which imports the classes that they name, say what config and head say."""
    if read_json(folder / "config.json").get("model_type") == POOLER_MODEL_TYPE:
        for path in files_of(folder):
            if path.startswith(("modules.json", "1_Pooling/", "2_Dense/", "sentence_bert_config.json")):
                yield f"{path} is a second head beside the classifier: CrossEncoder would score otherwise. {AGAIN}"
        return
    try:
        _, places = read_headers(weight_files(folder))
        head = [read_tensor(places[key], key) for key in ("head.weight", "head.bias")]
        pooling = read_json(folder / "config.json").get("classifier_pooling", "")
        template = (folder / CHAT_TEMPLATE.name).is_file()
        with tempfile.TemporaryDirectory() as scratch:
            write_sentence_transformers_files(Path(scratch), head[0], head[1], pooling, chat_template=template)
            for path in files_of(Path(scratch)):
                there = folder / path
                if not there.is_file() or there.read_bytes() != (Path(scratch) / path).read_bytes():
                    yield f"{path} is not that of this config and head: CrossEncoder would score otherwise. {AGAIN}"
    except (OSError, ValueError, KeyError) as error:
        yield f"the modules for sentence-transformers cannot be checked: {error}. {AGAIN}"


def check_card(folder: Path) -> Iterator[str]:
    path = folder / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        expected = results_of(card)
    except Exception as error:  # huggingface_hub's, yaml's, and those of a metadata block of any form
        yield f"README.md's metadata is not valid: {error}. Correct the card's template, and build the folder again."
        return
    for key in CARD_KEYS:
        if not card.data.get(key):
            yield f"README.md's metadata has no {key}. Add it to the card's template, and build the folder again."
    if card.data.get("pipeline_tag") not in (None, "text-ranking"):
        yield f"README.md's pipeline_tag is {card.data.get('pipeline_tag')!r}; a reranker's is text-ranking."
    for key in ("base_model", "datasets"):
        named = card.data.get(key) or []
        for name in [named] if isinstance(named, str) else named:
            try:
                validate_repo_id(name)
            except HFValidationError:
                yield f"README.md's {key} {name!r} is no Hub id. Name it as on the Hub, or leave it out."
    there = {file.name: file for file in (folder / RESULTS_FOLDER).glob("*")}
    for name in sorted(expected.keys() ^ there.keys()):
        yield f"{RESULTS_FOLDER}/{name} and the card's results are not the same. {AGAIN}"
    for name in sorted(expected.keys() & there.keys()):
        if there[name].read_text(encoding="utf-8") != expected[name]:
            yield f"{RESULTS_FOLDER}/{name} does not say what the card says. {AGAIN}"


def check_probes(folder: Path) -> Iterator[str]:
    try:
        _, expected = read_probes(folder)
        if not all(-1 <= score <= 1 for score in expected):
            yield f"{PROBES_FILE} expects scores outside [-1, 1]. {AGAIN}"
    except ValueError as error:
        yield f"{error}. {AGAIN}"


def check_engine(folder: Path, name: str) -> list[str]:
    requests, expected = read_probes(folder)
    try:
        scores = ENGINES[name](folder, requests)
    except ImportError as error:
        return [f"{name} cannot be tried: {error}. pip install querit-reranker[recipes]"]
    except Exception as error:  # whatever an engine raises is what its user would meet
        return [f"{name} fails: {error!r}. {AGAIN}"]
    pairs = [(query, document) for query, documents in requests.items() for document in documents]
    off = [
        f"{query!r}, {document[:40]!r}: {score:.4f} instead of {wanted:.4f}"
        for (query, document), score, wanted in zip(pairs, scores, expected, strict=True)
        if not abs(score - wanted) <= TOLERANCE  # a NaN is off, too
    ]
    if not off:
        return []
    return [f"{name} scores {len(off)} of {len(pairs)} probe pairs otherwise, such as {off[0]}. {AGAIN}"]


def read_json(path: Path) -> dict:
    """An empty dict for what is missing or no JSON object: other checks tell of that."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "hashes": check_sums,
    "kinds of files": check_kinds,
    "remote code": check_code,
    "tensors": check_weights,
    "labels": check_labels,
    "modules for sentence-transformers": check_modules,
    "card": check_card,
    "probe pairs": check_probes,
}
