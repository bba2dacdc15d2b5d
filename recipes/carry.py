"""Put a trained model under a new vocabulary: what it learnt stays, and new pieces begin as recipes.base makes them.

    python -m recipes.carry --trained hub_card/querit-reranker-nano --base runs/querit-nano/base \
        --output_dir runs/querit-nano/carried

Body, head and the embeddings of pieces that stand in both vocabularies are the trained model's; the tokenizer and the
other pieces' embeddings are those of `base`, which lie in the same space, the English teacher's. Alignment
(recipes.align) then teaches the new pieces.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForSequenceClassification
from trl import TrlParser

from hub_card.provenance import merges_of, write_merges
from querit.files import appears_whole, write_json
from recipes.lib.records import already_made

REPORT = "carried.json"


@dataclass
class CarryArguments:
    trained: str = field(metadata={"help": "Folder of the trained model, with its tokenizer."})
    base: str = field(metadata={"help": "Folder that recipes.base wrote for the new vocabulary."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})


def main(args: CarryArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    trained, model = (
        BertForSequenceClassification.from_pretrained(path, dtype=torch.float32) for path in (args.trained, args.base)
    )
    wide, narrow = model.config.hidden_size, trained.config.hidden_size
    if wide != narrow:
        raise ValueError(f"{args.base} is {wide} wide, {args.trained} {narrow}: they have no space in common.")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    old, new = AutoTokenizer.from_pretrained(args.trained).get_vocab(), tokenizer.get_vocab()
    shared = [piece for piece in new if piece in old]
    rows: torch.Tensor = model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    learnt: torch.Tensor = trained.get_input_embeddings().weight.detach()  # type: ignore[operator]
    rows[[new[piece] for piece in shared]] = learnt[[old[piece] for piece in shared]]
    state = trained.state_dict() | {"bert.embeddings.word_embeddings.weight": rows}
    model.load_state_dict(state)
    with appears_whole(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_merges(folder, merges_of(args.trained))
        write_json(folder / REPORT, {"pieces": len(new), "kept": len(shared), "settings": asdict(args)})
    print(f"{out}: {len(new):,} pieces, {len(shared):,} of them as they were trained")


if __name__ == "__main__":
    (arguments,) = TrlParser(CarryArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
