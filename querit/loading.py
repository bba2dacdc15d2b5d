"""A model's name becomes a ranker: the one place that assembles model, tokenizer and pipeline."""

from collections.abc import Sequence
from pathlib import Path

HUB_ID = "querit/querit-reranker-nano"
RELEASED = Path(__file__).parents[1] / "hub_card" / "querit-reranker-nano"


def named(model: str | None) -> str:
    """The folder or Hub repo that a name stands for; the released Nano's own name, or none, is Nano."""
    if model is None or (model == RELEASED.name and not Path(model).exists()):
        return str(RELEASED) if RELEASED.exists() else HUB_ID
    return model


def check_exists(name: str) -> None:
    """FileNotFoundError for a path that is not there. NAMESPACE/NAME may be a Hub repo, which is not asked for here."""
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"{name} does not exist: it is neither a folder here nor the name of a Hub repo (namespace/name)."
        )


def folder_of(source: str, revision: str | None = None) -> Path:
    """A model's folder: the one named, or that of the Hub repo named, downloaded. Raises what `load` does."""
    from querit.download import download

    if Path(source).exists():
        if revision:
            raise ValueError(
                f"{source} is here, on this machine, where nothing tells commits apart. Leave {revision} out, or name "
                "the Hub repo from a folder in which nothing is called the same."
            )
        if not Path(source).is_dir():
            raise ValueError(f"{source} is a file. Give the folder of a model, or the .onnx file of an export.")
        return Path(source)
    check_exists(source)
    try:
        return download(source, revision)
    except OSError as error:
        raise OSError(f"There is no folder {source} here, and as a Hub repo: {error}") from None


def load(
    source: str | Path | None = None,
    revision: str | None = None,
    *,
    device: str | None = None,
    devices: Sequence[str] | None = None,
    dtype: str = "auto",
):
    """The text-ranking pipeline over a folder, Hub repo or .onnx file. It runs the code installed here, no remote code.

    Args:
        source: the released Nano if None.
        revision: commit of a Hub repo.
        device: where it computes; the pipeline's own choice if None. Not with `devices`.
        devices: devices that share the work, a process each.
        dtype: of the weights, as in transformers.

    Raises ValueError for what is no Querit reranker, OSError for what cannot be read or reached.
    """
    from hub_card.convert import check_ids, check_weight_files, read_tokenizer
    from hub_card.from_sentence_transformers import check_one_head
    from modeling_querit.modeling_querit import QueritForSequenceClassification
    from modeling_querit.pipeline_querit import TextRankingPipeline
    from querit.devices import DevicesPipeline, read_devices

    if device and devices:
        raise ValueError("devices takes the place of device: give only one of them.")
    if device is not None:
        read_devices([device])  # tells in words what is none
    source = named(None if source is None else str(source))
    if source.endswith(".onnx"):
        if devices:
            raise ValueError("devices are not for .onnx files, which use every core by themselves.")
        from hub_card.exported_onnx import OnnxReranker

        exported = OnnxReranker(source)
        tokenizer = read_tokenizer(Path(source).parent.parent)
        return TextRankingPipeline(exported, tokenizer=tokenizer, device="cpu")  # type: ignore[arg-type]
    folder = folder_of(source, revision)
    check_weight_files(folder)
    check_one_head(folder)
    tokenizer = read_tokenizer(folder)
    model = QueritForSequenceClassification.from_pretrained(folder, dtype=dtype)
    check_ids(tokenizer, len(model.get_input_embeddings().weight), folder)
    if devices is not None:
        return DevicesPipeline(folder, model, tokenizer, devices, dtype)
    return TextRankingPipeline(model, tokenizer=tokenizer, device=device, dtype=dtype)
