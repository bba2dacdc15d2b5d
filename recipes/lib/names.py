"""Names as Russian text spells them: English spelling -> Cyrillic, by rules, with a case ending.

A dictionary of words knows few names, and a reader of Russian meets them in Cyrillic. The rules are those of practical
transcription in short (Гиляревский and Старостин 1985, "Иностранные имена и названия в русском тексте"): English
spelling does not tell its sound, so where it may be read in several ways one of them is drawn.
"""

import random
import re

# The longest first; of several readings one is drawn.
SOUNDS = {
    "sch": "ш", "tch": "ч", "igh": "ай", "eau": "о", "sh": "ш", "ch": "ч", "th": "т", "ph": "ф", "kh": "х", "zh": "ж",
    "ck": "к", "qu": "кв", "wh": "у", "oo": "у", "ee": "и", "ea": "и", "ou": "у ау оу", "ow": "оу ау", "au": "ау о",
    "aw": "о", "ay": "ей ай", "ai": "ей ай", "ey": "и ей", "ei": "ей ай", "ie": "и", "oa": "оу", "eu": "ю", "ew": "ью",
    "ya": "я", "yu": "ю", "yo": "йо ё", "ye": "е", "ia": "ия", "ss": "сс с", "ll": "лл л", "nn": "нн н", "tt": "тт т",
    "a": "а а э", "b": "б", "c": "к", "d": "д", "e": "е", "f": "ф", "g": "г", "h": "х", "i": "и", "j": "дж", "k": "к",
    "l": "л", "m": "м", "n": "н", "o": "о", "p": "п", "q": "к", "r": "р", "s": "с", "t": "т", "u": "у а ю", "v": "в",
    "w": "у в", "x": "кс", "y": "и", "z": "з",
}  # fmt: skip
BEFORE_FRONT = {"c": "с", "g": "дж г"}  # before e, i and y
AT_START = {"e": "э", "y": "й", "x": "кс"}
SPELLING = re.compile("|".join(sorted(SOUNDS, key=len, reverse=True)))
NAME = re.compile("[A-Za-z]{3,}")


def in_cyrillic(name: str, rng: random.Random) -> str:
    """Lower case; ValueError for a name that is not of three English letters or more."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name in English letters.")
    name = name.lower()
    silent = len(name) > 3 and re.search("[^aeiouy]e$", name)
    body = name[:-1] if silent else name

    def sound(found: re.Match) -> str:
        spelt, following = found[0], name[found.end() : found.end() + 1]
        if found.start() == 0 and spelt in AT_START:
            return AT_START[spelt]
        if spelt == "a" and not following:
            return "а"  # an ending that Russian declines
        if spelt in BEFORE_FRONT and following in ("e", "i", "y"):
            return rng.choice(BEFORE_FRONT[spelt].split())
        return rng.choice(SOUNDS[spelt].split())

    return declined(SPELLING.sub(sound, body), rng)


def declined(name: str, rng: random.Random) -> str:
    """In the nominative half of the time, else in another case, as names of its ending have it."""
    if rng.random() < 0.5:
        return name
    if name[-1] in "ая":
        return name[:-1] + rng.choice(["и", "е", "ю"] if name[-1] == "я" else ["ы", "е", "у", "ой"])
    if name[-1] in "бвгджзклмнпрстфхцчш":
        return name + rng.choice(["а", "у", "ом", "е"])
    return name
