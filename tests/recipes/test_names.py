"""English names in Cyrillic, as the questions of Russian readers have them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.lib.names import in_cyrillic

ENDINGS = "|а|у|ом|е|ы|ой|и|ю"


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("Houston", {"хоустон", "хаустон", "хустон"}),
        ("Hobson", {"хобсон"}),
        ("Shelby", {"шелби"}),
        ("Cyrus", {"сирус", "сирас", "сирюс"}),  # c before y
        ("Edith", {"эдит"}),  # e at the start
        ("Quincy", {"квинси"}),
        ("Blake", {"блак", "блэк"}),  # an e that is not read
    ],
)
def test_sounds_are_those_of_practical_transcription(name, spelt):
    found = {in_cyrillic(name, random.Random(seed)) for seed in range(80)}
    assert spelt <= found
    assert {word for word in found if not any(word.startswith(stem) for stem in spelt)} == set()
    endings = {word.removeprefix(max((s for s in spelt if word.startswith(s)), key=len)) for word in found}
    assert endings <= set(ENDINGS.split("|"))


def test_names_stand_in_cases_as_their_ending_has_it():
    found = {in_cyrillic("Norma", random.Random(seed)) for seed in range(200)}
    assert found == {"норма", "нормы", "норме", "норму", "нормой"}
    assert {in_cyrillic("Otto", random.Random(seed)) for seed in range(50)} <= {"отто", "ото"}  # not declined


@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=20), st.integers(0, 99))
def test_any_name_is_spelt_in_cyrillic_alone(name, seed):
    spelt = in_cyrillic(name, random.Random(seed))
    assert spelt and all("а" <= letter <= "я" or letter == "ё" for letter in spelt)
    assert in_cyrillic(name.upper(), random.Random(seed)) == spelt


@pytest.mark.parametrize("name", ["", "Jo", "Zoë", "O'Neil", "R2D2"])
def test_what_is_no_name_in_english_letters_is_refused(name):
    with pytest.raises(ValueError, match="no name in English letters"):
        in_cyrillic(name, random.Random(0))
