"""Rows of CSV and TSV files. Text that a wrong delimiter or a stray quote would cut or glue is refused, not lost."""

import csv
import itertools
import re
from collections.abc import Iterator

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # by suffix; spreadsheets of many countries write `;` in a .csv
OTHERS = (",", ";", "\t")
EXCELS = re.compile(r'"?sep=([^\r\n])"?[\r\n]*')  # a line before the columns that tells Excel the delimiter


def read_table(lines: Iterator[str], name: str, suffix: str, column: str | None) -> Iterator[tuple[str, dict]]:
    """(`name:line` where it begins, {column: text}) of every row. `lines` come with their ends.

    The delimiter is the one that makes `column` a column of the first line, else the one that makes most columns; that
    of the suffix where several do. Raises ValueError, naming the line, for rows that have more or fewer fields than
    there are columns, quotes that are not closed or are followed by text, and columns that are called the same.
    """
    csv.field_size_limit(2**31 - 1)  # a field may hold a whole document; csv expects 128 KiB
    header, before, told = next(lines, ""), 0, ""
    while header and ((found := EXCELS.fullmatch(header)) or not header.strip()):  # lines before that of the columns
        told = found[1] if found else told
        header, before = next(lines, ""), before + 1
    delimiter = told or find_delimiter(header, DELIMITERS[suffix], column)
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    begin = before + 1  # where a row begins: a quote that is not closed runs on to the end
    try:
        columns = [field.strip() for field in next(reader, [])]
        if twice := {field for field in columns if field and columns.count(field) > 1}:
            raise ValueError(f"{name}:{begin}: two columns are called {twice.pop()!r}; rename one.")
        begin = before + reader.line_num + 1
        for fields in reader:
            place, begin = f"{name}:{begin}", before + reader.line_num + 1
            if len(fields) > len(columns):
                raise ValueError(
                    f"{place}: more fields than columns ({len(fields)}, not {len(columns)}). Put text that holds "
                    f"{delimiter!r} in double quotes."
                )
            if fields and len(fields) < len(columns):
                raise ValueError(
                    f"{place}: fewer fields than columns ({len(fields)}, not {len(columns)}). Put text that holds line "
                    "breaks in double quotes, and keep the delimiters of fields that are empty."
                )
            if fields:  # a blank line is no row
                yield place, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{name}:{begin}: {error}. A field that begins with a quote must end with one, and quotes inside it must "
            "be doubled."
        ) from None


def find_delimiter(header: str, default: str, column: str | None) -> str:
    columns = {
        delimiter: [field.strip() for field in next(csv.reader([header], delimiter=delimiter), [])]
        for delimiter in (default, *OTHERS)
    }
    # max() takes the first of equal ones: the suffix's own.
    return max(columns, key=lambda delimiter: (column in columns[delimiter], len(columns[delimiter])))
