import json

import pytest

from querit.files import appears_whole, content_hash, file_hash, write_json, write_text


def test_a_file_or_folder_is_whole_or_not_there(tmp_path):
    file, folder = tmp_path / "new" / "a.txt", tmp_path / "model"
    with appears_whole(file) as aside:
        aside.write_text("one")
        assert not file.exists()
    assert file.read_text() == "one" and [path.name for path in file.parent.iterdir()] == ["a.txt"]
    (tmp_path / "model.writing").mkdir()  # of a run that was killed
    (tmp_path / "model.writing" / "half").touch()
    with appears_whole(folder) as aside:
        aside.mkdir()
        (aside / "weights").write_bytes(b"w")
    assert [path.name for path in folder.iterdir()] == ["weights"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.json"
    write_json(file, {"ä": 1})
    with pytest.raises(error), appears_whole(file) as aside:
        aside.write_text("half")
        raise error
    assert json.loads(file.read_text("utf-8")) == {"ä": 1} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_hash_tells_contents_and_names_apart(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_text(folder / "a", "x")
        write_text(folder / "b" / "c", "y")
    # By sha256sum: of the three bytes "abc" (FIPS 180-2, B.1).
    write_text(tmp_path / "abc", "abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content_hash(one) == content_hash(two) != content_hash(one / "b")
    write_text(two / "checkpoint-10" / "weights", "large")  # a trainer's, which may be deleted
    assert content_hash(one) == content_hash(two)
    (two / "a").rename(two / "d")
    assert content_hash(one) != content_hash(two)
