from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from modeling_querit.prompting_querit import PromptEncoder
from recipes.backbone import BackboneArguments, main
from tests.models_for_tests import CAUSAL_KINDS, tiny_config, tokenizer_of
from tests.tokenizers_for_tests import CHAT_TEMPLATE


def plain_backbone(folder, kind, rows_to_spare=0):
    """A backbone as it is published: no `[CLS]`, no prompt."""
    tokenizer = without_cls(tokenizer_of(kind))
    config = tiny_config(kind, vocab_size=len(tokenizer) + rows_to_spare)
    torch.manual_seed(0)
    MODEL_MAPPING[type(config)](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_cls(tokenizer):
    """The same tokenizer but for `[CLS]`, whose id the last added token takes."""
    from tokenizers import AddedToken, Tokenizer

    state = tokenizer.backend_tokenizer
    plain = Tokenizer(state.model)
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        if getattr(state, part) is not None:
            setattr(plain, part, getattr(state, part))
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content != "[CLS]":
            added = AddedToken(token.content, special=token.special, normalized=False)
            (plain.add_special_tokens if token.special else plain.add_tokens)([added])
    names = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=plain, padding_side="left", **names)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_a_plain_backbone_gets_cls_a_row_and_the_prompt(kind, tmp_path):
    source = plain_backbone(tmp_path / "plain", kind)
    before, plain = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    assert "[CLS]" not in plain.get_vocab()
    main(BackboneArguments(source=str(source), output_dir=str(tmp_path / "made")))
    after, tokenizer = AutoModel.from_pretrained(tmp_path / "made"), AutoTokenizer.from_pretrained(tmp_path / "made")

    rows = len(plain)
    assert tokenizer.convert_tokens_to_ids("[CLS]") == rows and len(tokenizer) == rows + 1
    assert after.config.vocab_size == rows + 1
    old, new = before.state_dict(), after.state_dict()
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name][: len(tensor)] if tensor.shape != new[name].shape else new[name]), name
    table = after.get_input_embeddings().weight
    mean, spread = table[:-1].mean(0), table[:-1].std(0)
    assert ((table[-1] - mean).abs() < spread).all()  # close to the mean, and not another row
    (pair,) = PromptEncoder(tokenizer, 128).encode("who?", ["The home team."])
    text = tokenizer.decode(pair.input_ids)
    prompt = "Judge whether the Content meets the requirements based on the Query. Query: who?; Content: The home team."
    assert text == prompt + "[CLS]" and tokenizer.chat_template == CHAT_TEMPLATE
    # special tokens that were there still are
    assert set(plain.all_special_tokens) <= set(tokenizer.all_special_tokens)


def test_rows_to_spare_are_used_and_a_made_folder_stays(tmp_path, capsys):
    source = plain_backbone(tmp_path / "plain", "qwen3", rows_to_spare=8)
    arguments = BackboneArguments(source=str(source), output_dir=str(tmp_path / "made"))
    main(arguments)
    before, after = AutoModel.from_pretrained(source), AutoModel.from_pretrained(tmp_path / "made")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    main(arguments)
    assert "delete it to make it again" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"other settings \(seed\)"):
        main(replace(arguments, seed=1))
