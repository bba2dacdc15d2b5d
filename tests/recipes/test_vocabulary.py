"""Nano's tokenizer: the teacher's pieces for English, whole words and parts of words for other languages."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from recipes.lib.pieces import CJK, SPECIAL, as_transformers, from_wordpiece, to_wordpiece, unigram
from recipes.vocabulary import (
    REPORT,
    VocabularyArguments,
    by_share,
    drawn_texts,
    main,
    part_pieces,
    used_most,
    word_cutter,
    word_shares,
)
from tests.recipes.folders_for_tests import write_beir
from tests.recipes.nano_for_tests import ENGLISH, GERMAN, JAPANESE, kinds, save_teacher, sentences, wordpiece

SCORES = {piece: -100.0 if kind == "special" else -6.0 for piece, kind in kinds().items()}
TOKENIZER = unigram(SCORES)


@pytest.mark.parametrize("text", ["The old dog sees the house.", "water, bread?", "SHIP", "Càt", "dogs xyz the", " "])
def test_english_is_cut_as_the_teacher_cuts_it(text):
    tokens = TOKENIZER.encode(text, add_special_tokens=False).tokens
    assert [to_wordpiece(token) for token in tokens] == wordpiece().encode(text, add_special_tokens=False).tokens


def test_words_of_the_other_languages_are_whole_and_cjk_has_no_start():
    assert TOKENIZER.encode("Das Haus", add_special_tokens=False).tokens == ["▁das", "▁haus"]
    assert TOKENIZER.encode("犬を見つける", add_special_tokens=False).tokens == ["犬", "を", "見つける"]
    alone, after = (TOKENIZER.encode(t, add_special_tokens=False).tokens for t in ("パン", "the パン"))
    assert alone == ["パン"] and after == ["▁the", "パン"]


def test_marks_go_from_latin_letters_alone():
    words = word_cutter()
    assert words("Éléphant ＡＢＣ café") == ["▁elephant", "▁abc", "▁cafe"]
    assert words("й が 가") == ["▁й", "が", "▁가"]
    assert words("a\u200bb\x00c") == ["▁abc"]


def test_letters_that_many_write_otherwise_are_one_word():
    words = word_cutter()
    assert words("Straße STRASSE") == ["▁strasse"] * 2  # as wordfreq's list has it
    assert words("чёрный ЧЕРНЫЙ") == ["▁черный"] * 2


@given(st.text(max_size=80))
def test_any_text_is_cut_and_every_offset_lies_in_it(text):
    encoding = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(encoding.ids) == len(encoding.offsets)
    assert all(0 <= start <= end <= len(text) for start, end in encoding.offsets)
    assert all(index < len(SCORES) for index in encoding.ids)


@given(st.text("ab [CLSEP]MAK", max_size=30))
def test_spelt_out_special_tokens_are_text(text):
    ids = as_transformers(TOKENIZER)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {0, 2, 3, 4} & set(ids)


def test_pieces_of_wordpiece_and_back():
    assert [from_wordpiece(t) for t in ("tide", "##s", "##é", "##.", ".", "[unused5]", "水", "##水", "в")] == [
        "▁tide", "s", None, None, "▁.", None, None, None, None,
    ]  # fmt: skip
    for token in (*ENGLISH, "##ing", "##7", "[SEP]"):
        assert to_wordpiece(from_wordpiece(token) or token) == token


def test_the_most_frequent_words_of_lists_and_texts_come_first():
    counts = Counter({"▁dampfschiff": 900, "▁und": 90, "▁r2d2": 50, "▁.": 40})
    by_text = by_share(word_shares("de", counts, word_cutter(), text_weight=1.0))
    assert by_text[:2] == ["▁dampfschiff", "▁und"] and "▁r2d2" not in by_text
    by_list = by_share(word_shares("de", counts, word_cutter(), text_weight=0.0))
    assert set(by_list[:8]) & {"▁der", "▁die", "▁und"} and by_list.index("▁und") < by_list.index("▁haus")
    japanese = by_share(word_shares("ja", Counter(), word_cutter(), text_weight=0.5))
    assert len(japanese) > 1000 and all(word_cutter()(word) == [word] and len(word) > 1 for word in japanese[:50])
    assert by_share(word_shares("ko", Counter(), word_cutter(), 0.5))[0].startswith("▁")


def test_every_source_has_its_share_of_the_texts():
    manual, news, little = (["m" * 10] * 500, ["n" * 20] * 500, ["l" * 5] * 8)
    drawn = Counter("".join(drawn_texts([manual, [], news, little], 1000, random.Random(0))))
    # 40 of the least, and the others half of what is left each, to the end of a text
    assert drawn == {"l": 40, "m": 480, "n": 480}
    assert Counter("".join(drawn_texts([little], 1000, random.Random(0)))) == {"l": 40}
    mixed = [f"{n:04}" for n in range(200)]
    kept = drawn_texts([mixed], 100, random.Random(1))
    assert len(kept) == 25 == len(set(kept)) and kept != mixed[:25]  # not the first ones


def test_parts_without_an_alphabet_are_ordered_by_what_they_save():
    assert set(part_pieces("zh", Counter({"图书馆": 3}), 3)) == {"图书馆", "图书", "书馆"}
    # 3 times 2 characters; the couple stands in both words, and saves 5 times 1
    assert part_pieces("zh", Counter({"图书馆": 3, "图书室": 2}), 3)[:2] == ["图书馆", "图书"]
    parts = part_pieces("ko", Counter({"▁도서관에서": 3, "▁12": 50}), 9)
    assert "▁도서" in parts and "에서" in parts and not any(character.isdigit() for part in parts for character in part)


STEMS = ["знамен", "квадрат", "спрос", "завод", "народ", "участ", "город", "вопрос"]
CASES = ["ами", "ого", "ный", "ных", "ному", "ение"]


def test_parts_of_an_alphabet_are_stems_and_endings():
    words = Counter({f"▁{stem}{case}": 5.0 for stem in STEMS for case in CASES})
    parts = part_pieces("ru", words, 40, syllables=3)
    assert {f"▁{stem}" for stem in STEMS} <= set(parts) and not set(parts) & words.keys()
    assert all(len(couple) == 2 and sum(couple in word for word in words) >= 16 for couple in parts[:3])
    endings = {part for part in parts[3:] if not part.startswith("▁")}
    assert endings and all(any(case.startswith(ending) or ending in case for case in CASES) for ending in endings)
    # what is known already is not counted among those that were asked for
    known = set(parts[:12])
    assert len(set(part_pieces("ru", words, 10, syllables=3, known=known)) - known) >= 10


def test_english_pieces_that_are_used_least_are_left_out():
    pieces = ["▁the", "▁tide", "s", "▁xylograph", "ographer", "a", "▁a"]
    counts = Counter({"▁the": 50, "▁tides": 3})
    assert used_most(pieces, counts, None) == set(pieces)
    assert used_most(pieces, counts, 5) == {"▁the", "▁tide", "s", "a", "▁a"}  # letters stay, whatever their use


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    save_teacher(folder / "teacher")
    rows = sentences(60)
    for language in ("en", "de", "ja"):
        texts = {f"d{n}": row[language] for n, row in enumerate(rows)}
        write_beir(folder / language, texts, {"q": rows[0][language]}, {"q": {"d0": 1}})
    main(arguments(folder))
    return folder


def arguments(folder, output="vocabulary", **changes) -> VocabularyArguments:
    values = {
        "teacher": str(folder / "teacher"), "output_dir": str(folder / output),
        "texts": {language: [str(folder / language)] for language in ("en", "de", "ja")},
        "words": {"de": 60, "ja": 40}, "parts": {"de": 20, "ja": 5}, "cjk_characters": 200, "hangul_characters": 0,
        "hangul_starts": 0, "other_characters": 300, "sample": 50,
    }  # fmt: skip
    return VocabularyArguments(**(values | changes))


def test_the_stage_takes_the_pieces_that_it_was_told_to(folder):
    report = json.loads((folder / "vocabulary" / REPORT).read_text(encoding="utf-8"))
    pieces, tokenizer = report["pieces"], AutoTokenizer.from_pretrained(folder / "vocabulary")
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(pieces)
    assert list(pieces)[:5] == list(SPECIAL.values()) and tokenizer.pad_token_id == 0
    counts = Counter(pieces.values())
    assert (counts["de"], counts["ja"], counts["blank"]) == (60, 40, 1) and counts["ja-part"] <= 5
    assert {f"▁{word}" for word in ENGLISH} <= pieces.keys()
    assert {f"▁{word}" for word in GERMAN[1:8]} <= pieces.keys()  # frequent in the text
    assert set("犬猫水家") <= pieces.keys()
    assert not any(piece.startswith("▁") and set(CJK) & set(piece[1:]) - set("-") for piece in pieces)
    found = report["report"]
    assert found["english_as_the_teacher"] == 1.0 and found["languages"]["de"]["unknown"] == 0
    pair = tokenizer("the dog", "犬")
    assert pair["token_type_ids"] == [0] * 4 + [1] * 2 and tokenizer.model_max_length == 512


def test_the_same_settings_give_the_same_file(folder, capsys):
    main(arguments(folder, "again"))
    again, first = ((folder / name / "tokenizer.json").read_bytes() for name in ("again", "vocabulary"))
    assert again == first
    main(arguments(folder))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must name the same languages; ko are not"):
        main(arguments(folder, "other", words={"ko": 3}, parts={"ko": 3}))
    with pytest.raises(ValueError, match="must name the same languages; ja are not"):
        main(arguments(folder, "other", parts={"de": 3}))


def test_the_files_tokenizer_is_the_one_that_any_engine_reads(folder):
    plain = Tokenizer.from_file(str(folder / "vocabulary" / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "vocabulary")
    for text in ("The dog sees das haus.", JAPANESE[8]):
        assert plain.encode(text, "cat").ids == tokenizer(text, "cat")["input_ids"]
