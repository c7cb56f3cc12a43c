"""Tables from strangers -> text cells: CSV, TSV and Parquet on any filesystem, and what is wrong with one in a line.

Only the columns that are asked for are read, so that a Parquet table may hold pictures or other large things as well.
"""

from __future__ import annotations

import difflib
import logging
import posixpath
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from prima_ray.base import PrimaError
from prima_ray.data.description import fold_column, leak_columns
from prima_ray.data.schema import open_filesystem

_log = logging.getLogger(__name__)
_PACKED = (".gz", ".bz2", ".zst", ".lz4")
_PARQUET = (".parquet", ".pq")
_FOREIGN = (".xlsx", ".xls", ".ods", ".json", ".jsonl", ".sqlite", ".db", ".sav", ".dta")
_DELIMITERS = (";", "\t", "|")


def read_table(
    path: str,
    wanted: Mapping[str, str],
    *,
    leaks: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str = "utf8",
) -> pa.Table:
    """Columns of a table with every cell as text; null where empty.

    Args:
        wanted: config key -> the column it names.
        leaks: columns that are read as well where the table has them, whatever their case and blanks.
        delimiter: None is a tab for ``.tsv`` and ``.tab``, else a comma.

    Raises:
        PrimaError: no such file, an unreadable one, one without rows, or one that lacks a wanted column.
    """
    filesystem, inner = open_filesystem(path)
    suffix = _suffix(inner)
    if suffix in _FOREIGN:
        raise PrimaError(f"{suffix} files are not read", where=path, mend="Save the table as CSV or Parquet.")
    # One thread, so that an error names its row.
    options = pa_csv.ReadOptions(encoding=encoding, use_threads=False)
    parse = pa_csv.ParseOptions(
        delimiter=delimiter or ("\t" if suffix in (".tsv", ".tab") else ","), newlines_in_values=True
    )
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.Directory:
            raise PrimaError("is a folder, not a table", where=path)
        if info.type == pafs.FileType.File and info.size == 0:
            raise PrimaError("the table is an empty file", where=path)
        if suffix in _PARQUET:
            with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                names = parquet.schema_arrow.names
        else:
            # Whatever the rows look like: a wrong delimiter makes them ragged, and shows in the header.
            header = pa_csv.ParseOptions(
                delimiter=parse.delimiter, newlines_in_values=True, invalid_row_handler=lambda _: "skip"
            )
            with filesystem.open_input_stream(inner) as stream, pa_csv.open_csv(stream, options, header) as reader:
                names = reader.schema.names
        leaking = leak_columns(leaks, names)
        declared = {f"data_set.leaks: {name}": name for name in leaking}
        check_columns(names, {**wanted, **declared}, where=path, delimited=suffix not in _PARQUET)
        _warn_of_absent(leaks, names)
        columns = list(dict.fromkeys([*wanted.values(), *leaking]))
        if suffix in _PARQUET:
            with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
                table = parquet.read(columns=columns)
        else:
            convert = pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            )
            with filesystem.open_input_stream(inner) as stream:
                table = pa_csv.read_csv(stream, options, parse, convert)
    except FileNotFoundError:
        raise PrimaError("no such table", where=path, mend="Check source.table.") from None
    except (pa.ArrowException, OSError, UnicodeError, LookupError) as error:
        raise _unreadable(path, error, encoding=encoding) from None
    if not table.num_rows:
        raise PrimaError("the table has no rows", where=path)
    return pa.table({name: _as_text(name, table[name], where=path) for name in columns})


def _suffix(path: str) -> str:
    stem, suffix = posixpath.splitext(path.lower())
    return posixpath.splitext(stem)[1] if suffix in _PACKED else suffix


def _unreadable(path: str, error: Exception, *, encoding: str) -> PrimaError:
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeError) or "invalid UTF8" in text:
        return PrimaError(
            f"the table is not {'UTF-8' if encoding == 'utf8' else encoding} text",
            where=path,
            mend="Save it as UTF-8, or name its encoding in source.encoding: latin-1, say.",
        )
    if isinstance(error, LookupError):
        return PrimaError(f"source.encoding: {encoding!r} is no encoding that Python knows")
    mend = "Cells that hold the delimiter or a line break must be quoted." if "CSV parse error" in text else None
    return PrimaError(f"cannot be read as a table ({text})", where=path, mend=mend)


def check_columns(names: Sequence[str], wanted: Mapping[str, str], *, where: str, delimited: bool = False) -> None:
    """Every column that the config names must be there, once.

    Args:
        wanted: config key -> the column it names.
        delimited: the table is text, so that a lone column may be a wrong delimiter's work.

    Raises:
        PrimaError: naming the first that is not, and the nearest that is.
    """
    for key, name in wanted.items():
        if names.count(name) > 1:
            raise PrimaError(f"the table has {names.count(name)} columns {name!r} ({key})", where=where)
        if name in names:
            continue
        found = next((mark for mark in _DELIMITERS if delimited and len(names) == 1 and mark in names[0]), None)
        if found is not None:
            shown = '"\\t"' if found == "\t" else f'"{found}"'
            raise PrimaError(
                f"the table has one column, {_short(names[0])}",
                where=where,
                mend=f"Its cells seem to be separated by something else: set source.delimiter to {shown}.",
            )
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"The table has {_short(', '.join(names), 400)}."
        raise PrimaError(f"the table has no column {name!r} ({key})", where=where, mend=hint)


def _warn_of_absent(leaks: Sequence[str], names: Sequence[str]) -> None:
    folded = {fold_column(name): name for name in names}
    for leak in leaks:
        if fold_column(leak) not in folded:
            near = difflib.get_close_matches(fold_column(leak), folded, n=1, cutoff=0.5)
            hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
            _log.warning("data_set.leaks: the table has no column %r, so copies of it cannot be found%s", leak, hint)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _as_text(name: str, column: pa.ChunkedArray, *, where: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        raise PrimaError(f"the column {name!r} holds {column.type}, not text or numbers", where=where) from None
