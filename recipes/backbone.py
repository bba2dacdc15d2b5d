"""Make a causal backbone ready for training: the token `[CLS]`, a row of the embeddings for it, Querit's prompt.

    python -m recipes.backbone --config recipes/querit-4b/0_backbone.yaml

Querit reads its score at `[CLS]`, which Qwen3 and DeepSeek-V3 do not have. Its row starts close to the mean of all
rows, as transformers draws it (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from trl import TrlParser

from modeling_querit.prompting_querit import PromptEncoder
from querit.files import appears_whole, write_json
from recipes.lib.records import already_made

CLS = "[CLS]"
REPORT = "backbone.json"
CHAT_TEMPLATE = Path(__file__).parents[1] / "modeling_querit" / "chat_template.jinja"


@dataclass
class BackboneArguments:
    source: str = field(metadata={"help": "Folder or Hub id of a causal backbone, with a fast tokenizer."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    revision: str | None = field(default=None, metadata={"help": "Commit of a source from the Hub."})
    seed: int = field(default=0, metadata={"help": "Seed of the new row."})


def main(args: BackboneArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    tokenizer = AutoTokenizer.from_pretrained(args.source, revision=args.revision)
    model = AutoModel.from_pretrained(args.source, revision=args.revision, dtype="auto")
    if CLS not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [CLS]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    PromptEncoder(tokenizer, 512)  # raises where this tokenizer cannot carry the prompt
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:  # some backbones have rows to spare
        torch.manual_seed(args.seed)
        model.resize_token_embeddings(len(tokenizer))
    with appears_whole(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / REPORT, {"settings": asdict(args)})
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {size:,} parameters, {max(rows, len(tokenizer)):,} rows, {CLS} is {tokenizer.vocab[CLS]}")


if __name__ == "__main__":
    (arguments,) = TrlParser(BackboneArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
