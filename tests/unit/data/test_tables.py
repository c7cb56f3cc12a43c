from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError
from prima_ray.data.tables import read_table

WANTED = {"source.columns.patient": "pat", "source.columns.image": "img"}


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    def write(content: bytes | str, name: str = "t.csv") -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write


def rows(path: str, **options: str) -> list[dict[str, str | None]]:
    found: list[dict[str, str | None]] = read_table(path, WANTED, **options).to_pylist()  # type: ignore[arg-type]
    return found


def mistake(path: str, **options: str) -> str:
    with pytest.raises(PrimaError) as caught:
        rows(path, **options)
    return str(caught.value).replace(str(Path(path).parent), "DIR")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("pat,img\n01,a\n02,\n", "t.csv"),
        ("\ufeffpat,img\r\n01,a\r\n02,\r\n", "T.CSV"),
        ("pat\timg\n01\ta\n02\t\n", "t.tsv"),
        ('extra,"pat",img\n1,01,"a"\n"x\ny",02,\n', "t.csv"),
        (gzip.compress(b"pat,img\n01,a\n02,\n"), "t.csv.gz"),
        (gzip.compress(b"pat\timg\n01\ta\n02\t\n"), "t.tsv.gz"),
    ],
)
def test_text_tables_are_read_as_they_are_written(table: Callable[..., str], content: bytes | str, name: str):
    assert rows(table(content, name)) == [{"pat": "01", "img": "a"}, {"pat": "02", "img": None}]


def test_delimiter_and_encoding_are_keys(table: Callable[..., str]):
    path = table("pat;img\nJosé;a,b\n".encode("latin-1"))
    assert rows(path, delimiter=";", encoding="latin-1") == [{"pat": "José", "img": "a,b"}]


def test_parquet_cells_become_text_and_other_columns_stay_unread(tmp_path: Path):
    path = tmp_path / "t.parquet"
    content = {"pat": [1.0, None], "img": [True, False], "pictures": [[b"x"], [b"y"]]}
    pq.write_table(pa.table(content), path)
    assert rows(str(path)) == [{"pat": "1", "img": "true"}, {"pat": None, "img": "false"}]
    assert read_table(str(path), WANTED, leaks=("absent",)).column_names == ["pat", "img"]


def test_a_nested_column_is_no_key(tmp_path: Path):
    pq.write_table(pa.table({"pat": [[1]], "img": ["a"]}), tmp_path / "t.parquet")
    assert mistake(str(tmp_path / "t.parquet")) == (
        "DIR/t.parquet: the column 'pat' holds list<element: int64>, not text or numbers"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "DIR/t.csv: the table is an empty file"),
        ("pat,img\n", "DIR/t.csv: the table has no rows"),
        (
            "pat;img\n1;a\n",
            "DIR/t.csv: the table has one column, pat;img\n"
            '  Its cells seem to be separated by something else: set source.delimiter to ";".',
        ),
        (
            "pat;img\n1;a,b\n",
            "DIR/t.csv: the table has one column, pat;img\n"
            '  Its cells seem to be separated by something else: set source.delimiter to ";".',
        ),
        ("pat,img,pat\n1,a,2\n", "DIR/t.csv: the table has 2 columns 'pat' (source.columns.patient)"),
        (
            "pat,img\n1,a\n1,a,b\n",
            "DIR/t.csv: cannot be read as a table (CSV parse error: Row #3: Expected 2 columns, got 3: 1,a,b)\n"
            "  Cells that hold the delimiter or a line break must be quoted.",
        ),
        (
            "pat,img\nJosé,a\n".encode("latin-1"),
            "DIR/t.csv: the table is not UTF-8 text\n"
            "  Save it as UTF-8, or name its encoding in source.encoding: latin-1, say.",
        ),
        (
            "x,y\n1,2\n",
            "DIR/t.csv: the table has no column 'pat' (source.columns.patient)\n  The table has x, y.",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_a_line(table: Callable[..., str], content: bytes | str, text: str):
    assert mistake(table(content)) == text


def test_files_that_are_no_tables(table: Callable[..., str], tmp_path: Path):
    assert mistake(str(tmp_path / "absent.csv")) == "DIR/absent.csv: no such table\n  Check source.table."
    assert mistake(table(b"PK", "t.xlsx")) == (
        "DIR/t.xlsx: .xlsx files are not read\n  Save the table as CSV or Parquet."
    )
    (tmp_path / "folder.csv").mkdir()
    assert mistake(str(tmp_path / "folder.csv")) == "DIR/folder.csv: is a folder, not a table"
    assert mistake(table(b"nonsense", "t.parquet")).startswith("DIR/t.parquet: cannot be read as a table (")
    assert "\n" not in mistake(table(b"nonsense", "t.parquet"))
    assert mistake(table("pat,img\n1,a\n"), encoding="klingon") == (
        "source.encoding: 'klingon' is no encoding that Python knows"
    )
