"""A few pairs in the eight languages that travel with a release, and what it scored them when it was built."""

import json
from pathlib import Path

from hub_card.engines import installed_ranker

PROBES_FILE = "probes.json"
DIGITS = 4  # of an expected score: beyond, machines may differ
PROBES = {
    "Why does the sea rise twice a day?": [
        "The Moon pulls harder on the near side of the Earth than on the far side, which raises two bulges of water.",
        "Salt lowers the temperature at which water freezes.",
        "El mar sube dos veces al día por la atracción de la Luna.",
        "潮の満ち引きは、月の引力によって一日に二度起こる。",
    ],
    "Wie bleibt Brot lange frisch?": [
        "In einem Leinenbeutel oder Tontopf trocknet ein Laib langsamer aus und schimmelt nicht so schnell.",
        "Le pain se garde mieux dans un torchon que dans un sac en plastique.",
        "Der Zug hält heute nicht in Kassel.",
    ],
    "怎样让自行车的链条不生锈？": [
        "每次雨天骑行之后，把链条擦干，再滴上几滴专用的润滑油。",
        "Чтобы цепь не ржавела, её вытирают насухо и смазывают.",
        "图书馆周一闭馆。",
    ],
    "철새는 어떻게 길을 찾나요?": [
        "철새는 해와 별의 위치, 그리고 지구의 자기장을 이용해 방향을 안다.",
        "Migrating birds steer by the stars and by the Earth's magnetic field. 🐦",
        "김치는 배추를 소금에 절여 담근다.",
        "",
    ],
}


def write_probes(folder: Path) -> None:
    """Score the pairs with the release in `folder`, in float32, and put both there.

    A pair that is too long for the model is left out: not every engine cuts it by itself. Raises ValueError where none
    fits.
    """
    ranker = installed_ranker(folder)
    pairs = []
    for query, documents in PROBES.items():
        for row in sorted(ranker(query, documents), key=lambda row: row["index"]):
            if not row["truncated"]:
                score = round(row["score"], DIGITS) + 0.0  # no minus before a zero
                pairs.append({"query": query, "document": row["document"], "score": score})
    if not pairs:
        raise ValueError(
            f"The model reads {ranker.max_length} tokens; the shortest probe pair has more. Raise max_length."
        )
    content = {"dtype": "float32", "pairs": pairs}
    (folder / PROBES_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_probes(folder: Path) -> tuple[dict[str, list[str]], list[float]]:
    """Query -> its documents, and the expected scores in that order. Raises ValueError for a file of another form."""
    requests: dict[str, list[str]] = {}
    expected: dict[str, list[float]] = {}
    try:
        for pair in json.loads((folder / PROBES_FILE).read_text(encoding="utf-8"))["pairs"]:
            requests.setdefault(pair["query"], []).append(pair["document"])
            expected.setdefault(pair["query"], []).append(float(pair["score"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{PROBES_FILE} holds no pairs with scores ({error!r})") from None
    if not requests:
        raise ValueError(f"{PROBES_FILE} holds no pairs")
    return requests, [score for scores in expected.values() for score in scores]
