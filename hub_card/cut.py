"""Whether a causal release's tokenizer lets the prompt be computed apart from the document, as the scoring engine does.

Querit tokenises what stands before the document once and each document by itself. Where a tokenizer merges over that
cut, these are not the ids of the whole prompt, which other engines compute: scores would differ, and nobody would know.
"""

from typing import Any

from modeling_querit.prompting_querit import PromptEncoder

# Beginnings of a document, one of each kind of character, between broken bars.
PROBE_DOCUMENTS = (  # noqa: SIM905 - a list of one a line would be longer than the module
    "¦ ¦  ¦   a¦\t¦\ta¦\n¦\n\na¦\r\n¦ \n a¦\x00¦\x0b¦\x85¦\u00a0a¦\u3000日¦\u200b¦\ufe0f¦\u20e3¦\ufffd¦\ue000¦\u0301"
    "¦\u0301a¦a¦A¦Word¦s¦'s¦'ll go¦’s¦1¦123¦12345¦٣¦é¦e\u0301¦ß¦日本¦한국¦ᄀ¦ひら¦カナ¦中1¦Привет¦שלום¦مرحبا¦नमस्ते"
    "¦ไทย¦😀¦👩\u200d👧¦.¦...¦:¦::¦;¦(a¦«¦。¦「¦—¦$5¦€5¦#a¦@a¦/a¦\\n¦_¦<a>"
).split("¦")


def check_cut(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer with a chat template that does, naming a document that shows it."""

    def chat(document: str) -> list[dict[str, str]]:
        return [{"role": "query", "content": "query"}, {"role": "document", "content": document}]

    documents = [*PROBE_DOCUMENTS]
    before = tokenizer.apply_chat_template(chat("\ue000"), tokenize=False).split("\ue000")[0]
    for token in tokenizer.get_vocab():  # one that reaches over the cut is the surest way to break it
        text = token.replace("Ġ", " ").replace("▁", " ")
        reach = (i for i in range(1, len(text)) if text[:i].strip() and before.endswith(text[:i]))
        documents.extend(text[i:] for i in reach)
    texts = tokenizer.apply_chat_template([chat(document) for document in documents], tokenize=False)
    wholes = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for document, ids, pair in zip(
        documents, wholes, PromptEncoder(tokenizer, 4096).encode("query", documents), strict=True
    ):
        if ids != pair.input_ids:
            raise ValueError(
                f"The tokenizer joins the prompt's words with a document that begins with {document!r}, so the prompt "
                "cannot be computed apart from it. Use the tokenizer published with the checkpoint."
            )
