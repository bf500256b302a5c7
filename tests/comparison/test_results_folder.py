"""The folder of results: whatever lies in it, no code is run and nothing is lost."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from expedit_d2.comparison import Comparison, Store, table_stem
from support.repository import VITDET, load_tool

pytestmark = pytest.mark.slow

HALF = ["--setting", "half: alpha=1 ratio=0.5"]


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "compared"


@pytest.fixture
def run(confident_opts, output):
    """The tool, on two images of a tiny detector."""

    def run(*options, config=VITDET):
        quick = ["--timed", "0", "--first", "2", "--pictures", "0", "--output", str(output)]
        load_tool("compare").run(
            ["--config-file", str(config), *quick, *options, "--", *confident_opts]
        )
        return Comparison.from_json((output / "vitdet.json").read_text())

    return run


def test_no_file_of_results_can_run_code(run, output, tmp_path):
    sentinel = tmp_path / "code was run"
    rows = run(*HALF).rows
    (reference,) = output.glob("*.npz")
    assert not list(output.glob("*.pickle"))
    hostile = pickle.dumps(Hostile(sentinel))
    reference.with_suffix(".pickle").write_bytes(hostile)
    reference.write_bytes(hostile)
    more = run(*HALF, "--setting", "alpha=2 ratio=0.5")
    assert more.rows[:2] == rows and len(more.rows) == 3
    # The same inside of a true npz file: an array of objects.
    np.savez(reference, index=np.array([Hostile(sentinel)], dtype=object))
    run(*HALF, "--setting", "alpha=2 ratio=0.75")
    assert not sentinel.exists()
    pickle.loads(hostile)
    assert sentinel.exists()  # it would have


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x00" * 100,
        b"PK\x03\x04 cut off",
        b"\x93NUMPY cut off",
    ],
)
def test_outputs_that_cannot_be_read_are_missing(tmp_path, content):
    store = Store(tmp_path)
    store.put_arrays("a", {"index": np.arange(3)})
    (file,) = tmp_path.glob("*.npz")
    assert Store(tmp_path).get_arrays("a")["index"].tolist() == [0, 1, 2]
    file.write_bytes(content)
    assert Store(tmp_path).get_arrays("a") is None


def test_outputs_that_are_missing_or_foreign_are_computed_again(run, output):
    rows = run(*HALF).rows
    (reference,) = output.glob("*.npz")
    plain_alone = (output / "results.jsonl").read_text().splitlines(keepends=True)[0]
    records = b'{"records": [["instances", 7]], "not_finite": []}'
    for arrays in (None, {"a": np.arange(3)}, {"index": np.frombuffer(records, np.uint8)}):
        (output / "results.jsonl").write_text(plain_alone)
        if arrays is None:
            reference.write_bytes(b"PK\x03\x04 cut off")
        else:
            np.savez(reference, **arrays)
        assert run(*HALF).rows == rows


def test_a_folder_in_place_of_outputs_is_named(run, output):
    run(*HALF)
    (reference,) = output.glob("*.npz")
    (output / "results.jsonl").unlink()
    reference.unlink()
    reference.mkdir()
    with pytest.raises(SystemExit, match="^compare.py: .*npz"):
        run(*HALF)


def test_torn_results_are_survived(run, output):
    rows = run(*HALF).rows
    file = output / "results.jsonl"
    whole = file.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    keys = [json.loads(line)["key"] for line in whole.splitlines()]
    for torn, left in (
        (b"", 0),
        (b"\x00" * 50, 0),
        (whole[:-20], 1),
        (first + b"\x00" * 9, 1),
        (first[:40], 0),
        (b"\xff\xfe\n" + whole, 2),
    ):
        file.write_bytes(torn)
        store = Store(output)
        assert [store.get(key) is not None for key in keys] == [left > 0, left > 1], torn
    for torn in (b"\x00" * 50, whole[:-20]):
        file.write_bytes(torn)
        assert run(*HALF).rows == rows
        assert len(Store(output).results) == 2


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\x00\xff", b"some notes\nof mine\n", "folder"]
)
def test_a_foreign_file_of_that_name_is_refused(run, output, content):
    output.mkdir()
    file = output / "results.jsonl"
    if content == "folder":
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match="^compare.py: .*results.jsonl' has no results"):
        run(*HALF)
    assert content == "folder" or file.read_bytes() == content


def test_a_folder_that_is_a_file_is_refused(run, output):
    output.write_text("a file")
    with pytest.raises(SystemExit, match="^compare.py: --output .* is a file"):
        run(*HALF)
    assert output.read_text() == "a file"


def test_two_configs_of_one_name_keep_their_tables(run, output, tmp_path, capsys):
    config = tmp_path / "other" / "vitdet.yaml"
    config.parent.mkdir()
    config.write_text(f"_BASE_: {VITDET}\nINPUT:\n  FORMAT: BGR\n")
    first = run(*HALF)
    run(*HALF, config=config)
    assert Comparison.from_json((output / "vitdet.json").read_text()) == first
    second = Comparison.from_json((output / "vitdet-2.json").read_text())
    assert second.config_file == str(config) and first.config_file == VITDET
    assert "vitdet-2.html" in capsys.readouterr().out
    # Each finds its own again.
    run(*HALF, config=config)
    run(*HALF)
    names = {file.stem for file in output.glob("*.html")}
    assert names == {"vitdet", "vitdet-2"}


def test_tables_never_replace_what_is_not_theirs(tmp_path):
    config = str(tmp_path / "model.yaml")
    stem = table_stem(tmp_path, "model", config)
    assert stem == tmp_path / "model"
    file = tmp_path / "model.json"
    for mine in ("", "\0\0", json.dumps({"config_file": config}), json.dumps({"model": "old"})):
        file.write_text(mine)
        assert table_stem(tmp_path, "model", config) == stem
    for foreign in ("[1, 2]", "text", json.dumps({"config_file": "/another"})):
        file.write_text(foreign)
        assert table_stem(tmp_path, "model", config) == tmp_path / "model-2"
    file.unlink()
    file.mkdir()
    assert table_stem(tmp_path, "model", config) == tmp_path / "model-2"
    shutil.rmtree(file)
