"""Bytes become text and JSON values, or a sentence that names the file, the line and the fix."""

import codecs
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

BYTE_ORDER_MARKS = {  # UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SURROGATE = re.compile("[\ud800-\udfff]")
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is half of a character


def clean(text: str) -> str:
    """Lone surrogates, which can be neither tokenised nor written, become U+FFFD."""
    return SURROGATE.sub("\ufffd", text)


def read_lines(file: BinaryIO, name: str, most_bytes: int | None = None) -> Iterator[str]:
    """The lines of a text, ends included; a line ends at \\n, \\r\\n or \\r. Unpacked where the name ends in .gz.

    UTF-8, or what the byte order mark says. ValueError, naming line and byte, for text that is not, an archive that is
    damaged, and more than `most_bytes`. The file is closed when all is read.
    """
    if name.lower().endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    number, offset = 0, 0
    try:
        if most_bytes is not None:
            data = file.read(most_bytes + 1)
            if len(data) > most_bytes:
                raise ValueError(f"{name} holds more than {most_bytes / 1e6:g} MB.")
            file = io.BytesIO(data)
        buffered = io.BufferedReader(file)  # type: ignore[type-var, arg-type]
        head = buffered.peek(64)[:64]
        encoding = next((e for mark, e in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        if encoding == "utf-8" and 2 * head.count(0) >= len(head) > 0:
            raise ValueError(f"{name} is no text, or UTF-16 without a byte order mark. Save it as UTF-8 text.")
        if head.startswith(codecs.BOM_UTF8):
            offset = len(buffered.read(3))
        # Bytes that are no UTF-8 are let through as surrogates, which UTF-8 itself cannot hold, to be told with their
        # place.
        text = io.TextIOWrapper(buffered, encoding, "surrogateescape" if encoding == "utf-8" else "strict", newline="")
        for number, line in enumerate(text, 1):
            if not line.isascii() and encoding == "utf-8" and (bad := SURROGATE.search(line)):
                offset += len(line[: bad.start()].encode())
                raise ValueError(
                    f"{name}:{number}: not UTF-8 text (0x{ord(bad[0]) - 0xDC00:02x}, byte {offset} of the file). "
                    f"Save it as UTF-8. If it is of an old Windows: iconv -f WINDOWS-1252 -t UTF-8 {name}"
                )
            offset += len(line.encode("utf-8"))
            yield line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not {encoding.upper()} text after line {number}, as its byte order mark says ({error.reason}). "
            "Save it as UTF-8."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is damaged after line {number} ({error}). Fetch it or pack it again.") from None


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank. ValueError with the place."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse_json(line, f"{name}:{number}")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """As `json_lines`, of a file, packed or not."""
    with path.open("rb") as file:
        yield from json_lines(read_lines(file, str(path)), str(path))


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text. Numbers that JSON has not (NaN, which pandas writes for what is missing) are null.

    Lone surrogates become U+FFFD. ValueError, naming the place, for what is no JSON, nested too deeply, or a number of
    more digits than can be read.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
        if HALF.search(text):
            value = json.loads(clean(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError(f"{place}: the JSON is nested too deeply to be read.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: no JSON ({error}).") from None
    except ValueError:  # of int()
        raise ValueError(f"{place}: a number has too many digits; write it as a text, in quotes.") from None
    return value


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
