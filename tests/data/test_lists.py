"""Lists of paths as people have them: text, CSV, TSV, parquet."""

import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import classes, logged, put

from ssl_xcit.data.decode import decode
from ssl_xcit.data.lists import labelled_lists, path_list


def test_lists_of_paths(tmp_path):
    for name in ("x/1.png", "x/2.png", "y z/3.png"):
        put(tmp_path / name)
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
    content = b"\xef\xbb\xbfx/1.png\n" + os.fsencode(odd) + b"\n"
    (tmp_path / "odd.txt").write_bytes(content)
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
        ("none.txt", None, "no such file"),
        ("empty.txt", b"\n", "lists no paths"),
        ("mixed.txt", b"a.png\t1\nb.png\n", "lines of [1, 2] columns"),
        ("binary.txt", b"\xff\xfe\x00", "not a text file"),
        ("gone.txt", b"nowhere/a.png\n", "set data.root=DIR"),
        ("bad.parquet", b"PAR1 not really", "bad.parquet"),
    ],
)
def test_bad_lists(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        path_list(str(tmp_path / name))


def test_bad_parquet_columns(tmp_path):
    pq.write_table(pa.table({"where": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="columns where; `path` is needed"):
        path_list(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"path": ["a"], "label": [None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="1 rows have no label"):
        path_list(str(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"path": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="not text"):
        path_list(str(tmp_path / "c.parquet"))


@pytest.fixture
def listed(tmp_path):
    classes(tmp_path, ["ant", "bee"], 4)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    return tmp_path, [(name, name.split("/")[0]) for name in names]


LISTS = {
    "spaces.txt": lambda rows: "".join(f"{p}\t{c}{' ' * ('1' in p)}\n" for p, c in rows),
    "table.csv": lambda rows: "path,label\n" + "".join(f"{p},{c}\n" for p, c in rows),
    "quoted.csv": lambda rows: "label,path\n" + "".join(f'{c},"{p}"\n' for p, c in rows),
    "more.csv": lambda rows: "id,Class Name,file_name\n" + "".join(f"1,{c},{p}\n" for p, c in rows),
    "bom.csv": lambda rows: "\ufeffpath,label\r\n" + "".join(f"{p},{c}\r\n" for p, c in rows),
    "semicolon.csv": lambda rows: "path;label\n" + "".join(f"{p};{c}\n" for p, c in rows),
    "bare.csv": lambda rows: "".join(f"{p},{c}\n" for p, c in rows),
    "table.tsv": lambda rows: "target\timage\n" + "".join(f"{c}\t{p}\n" for p, c in rows),
    "imagenet.txt": lambda rows: "".join(f"{p} {c}\n" for p, c in rows),
    "header.txt": lambda rows: "path\tlabel\n" + "".join(f"{p}\t{c}\n" for p, c in rows),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists_as_they_are_published(listed, name):
    root, rows = listed
    (root / name).write_text(LISTS[name](rows), newline="")
    source = path_list(str(root / name))
    assert source.class_names == ("ant", "bee")
    assert np.bincount(source.labels).tolist() == [4, 4]
    assert all(decode(source.read(i)).size for i in range(8))


def test_columns_by_name_backslashes_and_utf_16(listed):
    root, rows = listed
    text = "wo,was\n" + "".join("{},{}\n".format(p.replace("/", "\\"), c) for p, c in rows)
    (root / "a.csv").write_text(text)
    with pytest.raises(ValueError, match="separate folders by backslashes"):
        path_list(str(root / "a.csv"))
    named = {"image_column": "wo", "label_column": "was"}
    with pytest.raises(ValueError, match=r"set data\.backslashes=true"):
        path_list(str(root / "a.csv"), **named)
    assert path_list(str(root / "a.csv"), backslashes=True, **named).class_names == ("ant", "bee")
    with pytest.raises(ValueError, match="no column art; there are wo, was"):
        path_list(str(root / "a.csv"), image_column="wo", label_column="art")
    (root / "b.txt").write_text("\n".join(p for p, _ in rows), encoding="utf-16")
    assert len(path_list(str(root / "b.txt"))) == 8
    pq.write_table(pa.table({"wo": [p for p, _ in rows]}), root / "c.parquet")
    assert len(path_list(str(root / "c.parquet"), image_column="wo")) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\n1,a\n", "columns id, label; `path` is needed, or name it with data.image"),
        ('path,label\n"x,a\n', "not a table"),
        ("path,label\nx\n", "lines of [1, 2] columns"),
        ("path,label\nnone.png,a\n", "none of the paths tried exists"),
        ("path\n", "it lists no paths"),
    ],
)  # fmt: skip
def test_lists_that_are_none(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        path_list(str(tmp_path / "a.csv"))


def test_numbers_in_lists_and_tables(listed):
    root, rows = listed
    names = [name for name, _ in rows]
    (root / "a.csv").write_text(
        "path,y\n" + "".join(f"{p},{i / 7}\n" for i, (p, _) in enumerate(rows))
    )
    assert labelled_lists(str(root / "a.csv")).train.labels.dtype == np.float64
    (root / "b.csv").write_text(
        "path,y\n" + "".join(f"{p},{i % 2}.0\n" for i, (p, _) in enumerate(rows))
    )
    with pytest.raises(ValueError, match="are they classes or quantities"):
        labelled_lists(str(root / "b.csv"))
    assert path_list(str(root / "b.csv"), label_kind="classes").class_names == ("0", "1")
    pq.write_table(pa.table({"path": names, "label": [0.5] * 8}), root / "c.parquet")
    assert path_list(str(root / "c.parquet")).labels.dtype == np.float64


def test_labels_that_mean_nothing_do_not_keep_from_pretraining(listed, caplog):
    root, rows = listed
    (root / "a.txt").write_text("".join(f"{p}\t{i % 2}.0\n" for i, (p, _) in enumerate(rows)))
    assert path_list(str(root / "a.txt")).labels is None
    assert "labels are left out: " in logged(caplog)[0]
    with pytest.raises(ValueError, match="are they classes or quantities"):
        labelled_lists(str(root / "a.txt"))
    cells = "".join(f"{p},{c * (i > 2)}\n" for i, (p, c) in enumerate(rows))
    (root / "b.csv").write_text("path,label\n" + cells)
    with pytest.raises(ValueError, match="3 rows have no label"):
        labelled_lists(str(root / "b.csv"))
