"""Small tokenizers, trained in-process under the rules of the real ones, for every test that needs token ids.

Each call gives a fresh tokenizer, which a test may change; the training is done once per process.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (Path(__file__).parents[1] / "modeling_querit" / "chat_template.jinja").read_text(encoding="utf-8")

PROMPTS = [
    "Judge whether the Content meets the requirements based on the Query. Query: rain; Content: Rain fell all night.",
    "Given a question, find passages that answer it. Query: who won?; Content: The home team won by two goals.",
]
CORPUS = PROMPTS * 4 + [
    "The lighthouse keeper wrote the weather down every morning: wind, rain, fog and the height of the waves.",
    "A bicycle needs oil on the chain, air in the tyres and, once a year, new brake pads; it'll run for decades.",
    "Le boulanger ouvre à six heures ; les clients attendent déjà devant la porte, même l'hiver.",
    "Der Zug nach Köln fährt um 7:45 Uhr von Gleis 12 ab und hält unterwegs in Düsseldorf.",
    "El río baja crecido después de las lluvias de otoño, y el puente viejo está cerrado.",
    "Библиотека работает с девяти утра, а по выходным закрыта; книги можно продлить по телефону.",
    "图书馆每天早上九点开门，周末休息。你可以在网上续借图书。今天的天气很好，我们去公园散步吧。",
    "図書館は毎朝九時に開きます。週末は休みです。カメラを持って公園へ行きましょう。",
    "도서관은 매일 아침 아홉 시에 문을 엽니다. 주말에는 쉽니다. 오늘은 날씨가 좋습니다.",
    "المكتبة تفتح كل يوم في التاسعة صباحا. النص قصير. पुस्तकालय रोज़ सुबह नौ बजे खुलता है।",
    "def area(width, height):\n    # in square metres\n    return width * height\n\nprint(area(3, 4.25))  # 12.75\n",
    "Prices in 2024: $1,299.00 (was $1,450), i.e. -10.4%; e-mail sales@example.org or call +49 30 123456. 😀🎉",
]

# Copied from the released tokenizers: Qwen3's splits single digits, DeepSeek-V3's runs of up to three, then CJK runs.
QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3_SPLITS = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def qwen3_like_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, NFC, Qwen3's pre-tokeniser; `[CLS]` added; the chat template set. The cut is safe."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[CLS]"]
    return _causal(_trained("qwen3"), special, ["<think>", "</think>"], eos="<|im_end|>", pad="<|endoftext|>")


def deepseek_v3_like_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, no normaliser, DeepSeek-V3's pre-tokeniser; `[CLS]` added; the chat template set. Safe cut."""
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|im_start|>", "[CLS]"]
    return _causal(
        _trained("deepseek_v3"), special, ["<｜User｜>"], eos="<｜end▁of▁sentence｜>", pad="<｜▁pad▁｜>", bos=special[0]
    )


def unsafe_cut_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with no pre-tokeniser's splits: merges run over `Content: `, so the cut is not safe."""
    return _causal(_trained("unsplit"), ["<|endoftext|>", "[CLS]"], [], eos="<|endoftext|>", pad="<|endoftext|>")


def bert_like_tokenizer() -> PreTrainedTokenizerFast:
    """Nano's kind: Unigram and Metaspace, `[CLS] query [SEP] document [SEP]` with segment ids 0 and 1.

    The control tokens are pieces inside the vocabulary.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained("unigram")), model_max_length=512,
        cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


CAUSAL_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "qwen3": qwen3_like_tokenizer,
    "deepseek_v3": deepseek_v3_like_tokenizer,
}


def _causal(
    trained: str, special: list[str], plain: list[str], eos: str, pad: str, bos: str | None = None
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(trained)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def _trained(kind: str) -> str:
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        unigram = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, unigram)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return tokenizer.to_str()
    tokenizer = Tokenizer(models.BPE())
    if kind == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    splits = {"qwen3": [QWEN3_SPLIT], "deepseek_v3": DEEPSEEK_V3_SPLITS, "unsplit": []}[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400 if kind == "unsplit" else 1000,  # unsplit, more would learn whole sentences
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()
