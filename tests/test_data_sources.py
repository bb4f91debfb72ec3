"""Sources: real files of every kind, where their rows start, and what is said of broken ones."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from temper.data import files, hub, mini, sources
from temper.errors import DataError, RecipeError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def read(folder: Path, name: str, **options):
    return sources.read(name, base=folder, **options)


def fails(folder: Path, name: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, name, **options)
    return str(caught.value)


ROWS = [{"q": "2+2?", "a": "4"}, {"q": "перша\nдруга", "a": 'so "so", so'}, {"q": "\u2028", "a": ""}]


def as_csv(delimiter: str, end: str = "\r\n") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if set(text) & set(',;\t"\n') else text

    lines = [delimiter.join(("q", "a"))] + [delimiter.join((cell(r["q"]), cell(r["a"]))) for r in ROWS]
    return end.join(lines) + end


TEXTS = {
    "x.csv": (as_csv(","), ["x.csv:2", "x.csv:3", "x.csv:5"]),
    "semicolons.csv": (as_csv(";", "\n"), ["semicolons.csv:2", "semicolons.csv:3", "semicolons.csv:5"]),
    "x.tsv": (as_csv("\t"), ["x.tsv:2", "x.tsv:3", "x.tsv:5"]),
    "x.jsonl": (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:2]) + "\n\n" + json.dumps(ROWS[2]) + "\r\n",
        ["x.jsonl:1", "x.jsonl:2", "x.jsonl:4"],
    ),
    "x.ndjson": ("\n".join(map(json.dumps, ROWS)), ["x.ndjson:1", "x.ndjson:2", "x.ndjson:3"]),
    "x.json": (json.dumps(ROWS, indent=1), ["x.json:2", "x.json:6", "x.json:10"]),
    "one_line.json": (json.dumps(ROWS), ["one_line.json:1"] * 3),
    "lines.json": ("\n".join(map(json.dumps, ROWS)), ["lines.json:1", "lines.json:2", "lines.json:3"]),
    "inside.json": (
        json.dumps({"version": {"n": [1]}, "rows": ROWS, "z": 1}, indent=1),
        ["inside.json:8", "inside.json:12", "inside.json:16"],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("form", ["plain", "bom", "gz", "utf-16"])
def test_every_kind_gives_the_same_rows_and_the_lines_they_start_at(tmp_path, name, form):
    text, wheres = TEXTS[name]
    data = text.encode({"bom": "utf-8-sig", "utf-16": "utf-16"}.get(form, "utf-8"))
    if form == "gz":
        name, wheres, data = f"{name}.gz", [w.replace(":", ".gz:") for w in wheres], gzip.compress(data)
    (tmp_path / name).write_bytes(data)
    source = read(tmp_path, name, encoding="utf-16" if form == "utf-16" else "utf-8")
    assert [record.row for record in source.records] == ROWS
    assert [record.where for record in source.records] == wheres
    assert source.sha256 == hashlib.sha256(data).hexdigest() == sources.fingerprint(name, tmp_path)
    assert source.revision is None and source.name == name


def test_parquet_and_its_where_column(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"m": [[{"role": "user"}], []], "_where": ["a:1", "b:2"]}), tmp_path / "x.parquet"
    )
    records = read(tmp_path, "x.parquet").records
    assert [(r.row, r.where) for r in records] == [
        ({"m": [{"role": "user"}]}, "x.parquet:1"),
        ({"m": []}, "x.parquet:2"),
    ]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    assert "bad.parquet" in fails(tmp_path, "bad.parquet")


def test_text_is_one_row_a_paragraph(tmp_path):
    (tmp_path / "x.txt").write_bytes("\n\nперший\nрядок\r\n \nдругий".encode())
    records = read(tmp_path, "x.txt").records
    assert [(r.row["text"], r.where) for r in records] == [("перший\nрядок", "x.txt:3"), ("другий", "x.txt:6")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": 2\n{"a": 3}\n', ["x.jsonl:3", "broken JSON"]),
        ("x.jsonl", '{"a": 1}\n[1, 2]\n', ["x.jsonl:2", "object"]),
        ("x.json", '[\n{"a": 1},\n{"a": }\n]', ["x.json:3", "broken JSON"]),
        ("x.json", '[\n{"a": 1},\n7\n]', ["x.json:3", "object"]),
        ("x.json", '{"a": [1], "b": [2]}', ["one list", "a, b"]),
        ("x.csv", 'a,b\n"1\n1",2\n3\n', ["x.csv:4", "1 cells", "header 2"]),
        ("x.csv", "a,b\n1,2\n1,2,3\n", ["x.csv:3", "3 cells"]),
        ("x.csv", 'a,b\n1,2\n"3,4\n5,6\n', ["x.csv:3", "cannot be read"]),
        ("x.tsv", 'a\tb\n1\t2\n"x" y\t4\n', ["x.tsv:3", "cannot be read"]),
        ("x.csv", "a,a\n1,2\n", ["x.csv:1", "one name"]),
        ("x.csv", "a,b\n", ["no rows"]),
        ("x.jsonl.gz", "not gzip", ["x.jsonl.gz", "damaged"]),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    message = fails(tmp_path, name)
    for part in said:
        assert part in message


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n" + "я" * 200_000 + ",1\n", encoding="utf-8")
    assert len(read(tmp_path, "x.csv").records[0].row["a"]) == 200_000


def test_another_encoding_is_recognised(tmp_path):
    data = 'text\nok\n"Добрий день"\n'.encode("cp1251")
    (tmp_path / "x.csv").write_bytes(data)
    message = fails(tmp_path, "x.csv")
    assert f"byte {data.index('Д'.encode('cp1251'))} " in message and "x.csv:3" in message
    assert "cp1251" in message and "Добрий день" in message and "utf-16" not in message
    assert read(tmp_path, "x.csv", encoding="cp1251").records[1].row == {"text": "Добрий день"}
    (tmp_path / "y.csv").write_bytes("text\nДобрий\n".encode("utf-16"))
    assert "utf-16 (" in fails(tmp_path, "y.csv")
    assert "no encoding" in fails(tmp_path, "x.csv", encoding="cp125111")


def test_globs_and_folders(tmp_path):
    for folder, name, value in [("a", "1.jsonl", 1), ("b", "2.jsonl", 2), ("b", "3.jsonl", 3)]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(json.dumps({"v": value}))
    (tmp_path / "b" / "README.txt").write_text("not data")
    (tmp_path / "b" / ".hidden.csv").write_text("not data")
    records = read(tmp_path, "*/*.jsonl").records
    assert [(r.row["v"], r.where) for r in records] == [(1, "a/1.jsonl:1"), (2, "b/2.jsonl:1"), (3, "b/3.jsonl:1")]
    assert [r.row["v"] for r in read(tmp_path, "./b").records] == [2, 3]
    assert (
        read(tmp_path, "b/[23].jsonl").sha256
        == sources.fingerprint("./b", tmp_path)
        != read(tmp_path, "b/2.jsonl").sha256
    )
    message = fails(tmp_path, "b/*.csv.gz")
    assert "2.jsonl" in message and str(tmp_path / "b") in message
    (tmp_path / "b" / "4.csv").write_text("v\n4\n")
    assert "csv, jsonl" in fails(tmp_path, "b")
    (tmp_path / "empty").mkdir()
    assert "no data files" in fails(tmp_path, "./empty")


def test_a_folder_with_splits_is_never_read_as_one(tmp_path):
    for name in ("train-00.csv", "train-01.csv", "test.csv"):
        (tmp_path / name).write_text(f"v\n{name}\n")
    assert "test rows would be trained on" in fails(tmp_path, str(tmp_path))
    found = read(tmp_path, str(tmp_path), split="train").records
    assert [r.row["v"] for r in found] == ["train-00.csv", "train-01.csv"]
    assert sources.fingerprint(str(tmp_path), tmp_path, split="test") == sources.fingerprint("test.csv", tmp_path)
    assert "test.csv" in fails(tmp_path, str(tmp_path), split="dev")
    for options in ({"split": "train"}, {"config": "uk"}, {"revision": "main"}):
        with pytest.raises(RecipeError):
            read(tmp_path, "test.csv", **options)


@pytest.mark.parametrize(
    "source", ["tran.jsonl", "./tran.jsnl", "dat/tran.jsonl.gz", "/no/such/folder/x", "~/no such file"]
)
def test_what_looks_like_a_path_is_not_taken_for_a_hub_id(tmp_path, source):
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    (tmp_path / "data").mkdir()
    message = fails(tmp_path, source)
    assert f"there is no file {source}" in message
    if "tran" in source:
        nearest = "data" if source.startswith("dat/") else "train.jsonl"
        assert f"did you mean «{nearest}»" in message


def test_paths_are_taken_from_the_recipe_first(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "x.csv").write_text("v\nrecipe\n")
    (tmp_path / "here" / "x.csv").write_text("v\nhere\n")
    (tmp_path / "here" / "y.csv").write_text("v\nhere\n")
    monkeypatch.chdir(tmp_path / "here")
    assert read(tmp_path, "x.csv").records[0].row == {"v": "recipe"}
    assert read(tmp_path, "y.csv").records[0].row == {"v": "here"}


def test_columns_and_a_sample_of_rows(tmp_path):
    (tmp_path / "x.csv").write_text("i,b,c\n" + "".join(f"{i},b,c\n" for i in range(50)))
    some = read(tmp_path, "x.csv", columns=["i"], rows=10, seed=1).records
    numbers = [int(r.row["i"]) for r in some]
    assert len(numbers) == 10 and numbers == sorted(set(numbers)) and set(some[0].row) == {"i"}
    assert numbers != [int(r.row["i"]) for r in read(tmp_path, "x.csv", rows=10, seed=2).records]
    assert numbers != list(range(10))
    assert len(read(tmp_path, "x.csv", rows=500).records) == 50
    assert "known: b, c, i" in fails(tmp_path, "x.csv", columns=["text"])


def test_mini_sets(tmp_path):
    name = next(iter(mini.NAMES))
    source = read(tmp_path, f"mini:{name}", rows=5, seed=3)
    assert len(source.records) == 5 and source.records[4].where == f"mini:{name}#4"
    assert source.sha256 == sources.fingerprint(f"mini:{name}", tmp_path) and len(source.sha256 or "") == 64
    with pytest.raises(RecipeError, match=name):
        read(tmp_path, f"mini:{name}x")


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A folder laid out as a hub repository: the library reads both in one way."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("train", "test"):
        (repository / f"{name}.jsonl").write_text(json.dumps({"q": name, "n": [1, 2]}) + "\n")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: uk\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n- config_name: ru\n  data_files: test.jsonl\n---\n"
    )
    return repository


def test_hub_rows_configs_and_splits(hub_folder):
    data, _ = hub.load(str(hub_folder), config="uk", split=None, revision=None)
    assert data.to_list() == [{"q": "train", "n": [1, 2]}]
    data, _ = hub.load(str(hub_folder), config="uk", split="test", revision=None)
    assert data.to_list() == [{"q": "test", "n": [1, 2]}]
    for config, split, said in [
        ("fr", None, "no config «fr»"),
        (None, None, "needs a config"),
        ("uk", "dev", "no split «dev»"),
    ]:
        with pytest.raises(DataError) as caught:
            hub.load(str(hub_folder), config=config, split=split, revision=None)
        assert said in str(caught.value)
        assert ("test" if split else "ru") in caught.value.where  # what there is


def test_hub_scripts_are_refused_with_the_way_out(hub_folder):
    (hub_folder / "repository.py").write_text("")
    with pytest.raises(DataError, match="refs/convert/parquet"):
        hub.load(str(hub_folder / "repository.py"), config=None, split=None, revision=None)


def test_hub_errors_that_need_the_network():
    """The texts are those of datasets 5.2 (load.py)."""
    from datasets.exceptions import DatasetNotFoundError

    gated = hub.explain(
        DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it."),
        "a/b",
    )
    assert "HF_TOKEN" in gated.do and "huggingface.co/datasets/a/b" in gated.do
    away = hub.explain(ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"), "a/b")
    assert "«a/b» cannot be reached" in away.what and "local" in away.do
    none = hub.explain(DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "a/b")
    assert "no data set «a/b»" in none.what


def test_kinds():
    assert [files.kind_of(n) for n in ("a/b.CSV.gz", "x.ndjson", "x.md", "gz", "owner/name", "v1.5")] == [
        "csv", "jsonl", None, None, None, None]  # fmt: skip


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_real_files():
    tsv = read(SHARED, "ru_instruct_gpt4/train.tsv").records
    lines = read(SHARED, "ru_instruct_gpt4/train.jsonl").records
    assert [r.row for r in tsv] == [r.row for r in lines] and len(tsv) == 100
    text = (SHARED / "ru_instruct_gpt4/train.tsv").read_text(encoding="utf-8").split("\n")
    for record in tsv:  # the line that is named begins with the first cell
        line = text[int(record.where.rpartition(":")[2]) - 1]
        first = record.row["instruction"].split("\n")[0].replace('"', '""').strip()
        assert line.lstrip('" ').startswith(first.lstrip('" '))
    assert len(read(SHARED, "clean_comedy_gold/*.csv").records) == 2000
    with (SHARED / "bruk_uk/meta.csv").open(encoding="utf-8", newline="") as file:
        assert [r.row for r in read(SHARED, "bruk_uk/meta.csv").records] == list(csv.DictReader(file))
    pairs = "rasbt_instruct_dpo/instruction-data-with-preference.json"
    assert [r.row for r in read(SHARED, pairs).records] == json.loads((SHARED / pairs).read_text(encoding="utf-8"))
