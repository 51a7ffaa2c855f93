"""Lists of paths as people have them: text, CSV, TSV, parquet."""

import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import classes, logged, put, put_all

from ssl_xcit.data.decode import decode
from ssl_xcit.data.lists import labelled_lists, path_list


def test_lists_of_paths(tmp_path):
    put_all(tmp_path, ("x/1.png", "x/2.png", "y z/3.png"))
    (tmp_path / "plain.txt").write_text("x/1.png\n\ny z/3.png\r\n")
    source = path_list(str(tmp_path / "plain.txt"))
    assert [decode(source.read(i)).shape for i in range(2)] == [(12, 12, 3)] * 2
    assert source.labels is None
    assert source.name(1) == f"{tmp_path}/y z/3.png"
    (tmp_path / "labels.txt").write_text("1.png\t10\n2.png\t9\n")
    source = path_list(str(tmp_path / "labels.txt"), str(tmp_path / "x"))
    assert source.class_names == ("9", "10")
    assert source.labels.tolist() == [1, 0]
    table = pa.table({"path": ["x/1.png", "x/2.png", "y z/3.png"], "label": ["b", "a", "b"]})
    pq.write_table(table, tmp_path / "list.parquet")
    source = path_list(str(tmp_path / "list.parquet"))
    assert source.labels.tolist() == [1, 0, 1]
    pq.write_table(table.select(["path"]), tmp_path / "bare.parquet")
    assert path_list(str(tmp_path / "bare.parquet")).labels is None
    odd = "x/\udce9\u2028\x0c.png"  # Latin-1 and other ends of lines, legal in names
    put(tmp_path / odd)
    put(tmp_path / "odd.txt", b"\xef\xbb\xbfx/1.png\n" + os.fsencode(odd) + b"\n")
    source = path_list(str(tmp_path / "odd.txt"))
    assert [decode(source.read(i)).shape for i in range(2)] == [(12, 12, 3)] * 2
    with pytest.raises(ValueError, match="without images to learn from"):
        labelled_lists(None, str(tmp_path / "list.parquet"))
    pair = labelled_lists(str(tmp_path / "list.parquet"), test_fraction=0.5)
    assert pair.test.labels.tolist() == [1]
    assert labelled_lists(None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n", "lists no paths"),
        ("mixed.txt", b"a.png\t1\nb.png\n", "lines of [1, 2] columns"),
        ("binary.txt", b"\xff\xfe\x00", "not a text file"),
        ("bad.parquet", b"PAR1 not really", "bad.parquet"),
        ("a.parquet", {"where": ["a"]}, "columns where; `path` is needed"),
        ("b.parquet", {"path": ["a"], "label": [None]}, "1 rows have no label"),
        ("c.parquet", {"path": [1]}, "not text"),
        ("a.csv", b"id,label\n1,a\n", "columns id, label; `path` is needed, or name it with "
         "data.image"),
        ("a.csv", b'path,label\n"x,a\n', "not a table"),
        ("a.csv", b"path,label\nx\n", "lines of [1, 2] columns"),
        ("a.csv", b"path,label\nnone.png,a\n", "none of the paths tried exists"),
        ("a.csv", b"path\n", "it lists no paths"),
    ],
)  # fmt: skip
def test_bad_lists(tmp_path, name, content, message):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        put(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        path_list(str(tmp_path / name))


@pytest.fixture
def listed(tmp_path):
    classes(tmp_path, ["ant", "bee"], 4)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    return tmp_path, [(name, name.split("/")[0]) for name in names]


def table(path, rows, line="{p},{c}\n", head="path,label\n"):
    cells = ({"p": p, "c": c, "space": " " * ("1" in p)} for p, c in rows)
    return str(put(path, (head + "".join(line.format(**cell) for cell in cells)).encode()))


LISTS = {  # what stands above the lines, and a line
    "spaces.txt": ("", "{p}\t{c}{space}\n"),
    "table.csv": ("path,label\n", "{p},{c}\n"),
    "quoted.csv": ("label,path\n", '{c},"{p}"\n'),
    "more.csv": ("id,Class Name,file_name\n", "1,{c},{p}\n"),
    "bom.csv": ("\ufeffpath,label\r\n", "{p},{c}\r\n"),
    "semicolon.csv": ("path;label\n", "{p};{c}\n"),
    "bare.csv": ("", "{p},{c}\n"),
    "table.tsv": ("target\timage\n", "{c}\t{p}\n"),
    "imagenet.txt": ("", "{p} {c}\n"),
    "header.txt": ("path\tlabel\n", "{p}\t{c}\n"),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_as_they_are_published(listed, name):
    root, rows = listed
    head, line = LISTS[name]
    source = path_list(table(root / name, rows, line, head))
    assert source.class_names == ("ant", "bee")
    assert np.bincount(source.labels).tolist() == [4, 4]
    assert all(decode(source.read(i)).size for i in range(8))


def test_columns_by_name_backslashes_and_utf_16(listed):
    root, rows = listed
    rows = [(p.replace("/", "\\"), c) for p, c in rows]
    file, named = table(root / "a.csv", rows, head="wo,was\n"), {"image_column": "wo"}
    with pytest.raises(ValueError, match="separate folders by backslashes"):
        path_list(file)
    with pytest.raises(ValueError, match="no column art; there are wo, was"):
        path_list(file, label_column="art", **named)
    with pytest.raises(ValueError, match=r"set data\.backslashes=true"):
        path_list(file, label_column="was", **named)
    source = path_list(file, label_column="was", backslashes=True, **named)
    assert source.class_names == ("ant", "bee")
    names = [p for p, _ in listed[1]]
    (root / "b.txt").write_text("\n".join(names), encoding="utf-16")
    assert len(path_list(str(root / "b.txt"))) == 8
    pq.write_table(pa.table({"wo": names}), root / "c.parquet")
    assert len(path_list(str(root / "c.parquet"), **named)) == 8


def test_numbers_in_lists_and_tables(listed, caplog):
    root, rows = listed
    names = [name for name, _ in rows]
    fractions = table(root / "a.csv", [(p, i / 7) for i, p in enumerate(names)], head="path,y\n")
    assert labelled_lists(fractions).train.labels.dtype == np.float64
    pq.write_table(pa.table({"path": names, "label": [0.5] * 8}), root / "c.parquet")
    assert path_list(str(root / "c.parquet")).labels.dtype == np.float64
    whole = [(p, f"{i % 2}.0") for i, p in enumerate(names)]
    for file in (
        table(root / "b.csv", whole, head="path,y\n"),
        table(root / "b.txt", whole, "{p}\t{c}\n", ""),
    ):
        with pytest.raises(ValueError, match="are they classes or quantities"):
            labelled_lists(file)
        assert path_list(file, label_kind="classes").class_names == ("0", "1")
        caplog.clear()
        assert path_list(file).labels is None  # enough to pretrain on
        assert "labels are left out: " in logged(caplog)[0]


def test_rows_without_a_label(listed):
    root, rows = listed
    file = table(root / "b.csv", [(p, c * (i > 2)) for i, (p, c) in enumerate(rows)])
    with pytest.raises(ValueError, match="3 rows have no label"):
        labelled_lists(file)
