"""Tokenizers that would join the prompt with the document are refused; those of the releases' kinds are not."""

import json

import pytest
from tokenizers import Tokenizer

from hub_card.cut import check_cut
from tests.tokenizers_for_tests import CAUSAL_TOKENIZERS, qwen3_like_tokenizer, unsafe_cut_tokenizer


@pytest.mark.parametrize("kind", CAUSAL_TOKENIZERS)
def test_the_releases_kinds_pass(kind):
    check_cut(CAUSAL_TOKENIZERS[kind]())


def test_a_tokenizer_that_merges_over_blanks_is_refused():
    with pytest.raises(ValueError, match="joins the prompt's words with a document"):
        check_cut(unsafe_cut_tokenizer())


def test_one_token_over_the_cut_is_found():
    """A single merge over the cut, for one word that no fixed table of documents would hold."""
    tokenizer = qwen3_like_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"]["pretokenizers"].pop(0)  # merges may now run over blanks
    merges = [["Ġ", "z"], ["Ġz", "q"], [":", "Ġzq"]]
    vocabulary = {token: i for token, i in state["model"]["vocab"].items() if len(token) == 1}
    state["model"] |= {"merges": merges, "vocab": vocabulary}
    vocabulary |= {token: 5000 + number for number, token in enumerate(("Ġz", "Ġzq", ":Ġzq"))}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(ValueError, match="begins with 'zq'"):
        check_cut(tokenizer)
    merges.pop()
    del vocabulary[":Ġzq"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    check_cut(tokenizer)
