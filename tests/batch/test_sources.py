"""Sources: which samples there are, under which keys, and that nothing is read before its turn."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmv1.batch.sources import Columns, Sample, count, expand_braces, samples, shard_of
from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.media import ImageLimits
from tests.batch.captioning import LIMITS, make_pictures

NO_COLUMNS = Columns()


def listed(*sources: object, columns: Columns = NO_COLUMNS, limits: ImageLimits = LIMITS) -> list[Sample]:
    return list(samples([str(source) for source in sources], columns, limits))


def keys(*sources: object, columns: Columns = NO_COLUMNS) -> list[str]:
    return [sample.key for sample in listed(*sources, columns=columns)]


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def fault(sample: Sample) -> str:
    assert isinstance(sample.picture, ImageError)
    return sample.picture.message


def test_folder_is_read_to_its_depth_in_a_fixed_order(tmp_path: Path) -> None:
    made = make_pictures(tmp_path, 9)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "photo.HEIC").write_bytes(b"not readable, but not passed over")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.jpg").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert keys(tmp_path) == sorted([*made, "photo.HEIC"])
    assert [sample.picture for sample in listed(tmp_path)] == [tmp_path / key for key in sorted([*made, "photo.HEIC"])]


def test_keys_of_one_folder_do_not_depend_on_where_it_lies_and_of_several_do_not_clash(tmp_path: Path) -> None:
    for name in "ab":
        make_pictures(tmp_path / name, 2)
    assert keys(tmp_path / "a") == keys(tmp_path / "b") == ["000.jpg", "001.png"]
    assert len({*keys(tmp_path / "a", tmp_path / "b")}) == 4


def test_a_name_that_is_no_utf8_has_a_key_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jpg").write_bytes(b"x")
    (sample,) = listed(tmp_path)
    assert sample.key == "caf\\xe9.jpg" and isinstance(sample.picture, Path) and sample.picture.exists()


def test_glob_takes_pictures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path / "p", 4)
    (tmp_path / "p" / "000.txt").write_text("a caption")
    monkeypatch.chdir(tmp_path)
    assert keys("p/*") == ["p/000.jpg", "p/001.png", "p/003.png"]
    assert keys("p/**/*.jpg") == ["p/000.jpg", "p/sub/002.jpg"]
    with pytest.raises(ConfigError, match="no picture matches"):
        keys("p/*.webp")


def test_file_list_from_a_file_and_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("p/000.jpg\n\np/./001.png\r\nhttps://example.com/x.jpg\n")
    expected = ["p/000.jpg", "p/001.png", "https://example.com/x.jpg"]
    assert keys(tmp_path / "list.txt") == expected
    assert listed(tmp_path / "list.txt")[0].picture == tmp_path / "p/000.jpg"  # relative to the list
    (tmp_path / "stdin").write_bytes(b"\xef\xbb\xbfp/000.jpg\np/001.png\nhttps://example.com/x.jpg\ncaf\xe9.jpg\n")
    with (tmp_path / "stdin").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert keys("-") == [*expected, "caf\\xe9.jpg"]


def test_jsonl_rows_and_their_faults(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"x").decode()
    lines = [{"image": "a.jpg", "id": 7}, {"image": url}, {"other": 1}, "no object"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn")
    a, inline, none, text, torn = listed(path)
    assert a == Sample("a.jpg", tmp_path / "a.jpg")
    assert inline.key.startswith("data:") and len(inline.key) < 50 and inline.picture == url
    assert none.key == "rows.jsonl:3" and "--image-column" in fault(none)
    assert (text.key, torn.key) == ("rows.jsonl:4", "rows.jsonl:5") and "not a JSON object" in fault(torn)
    by_id = listed(path, columns=Columns("image", "id"))
    assert by_id[0].key == "7" and "--key-column" in fault(by_id[1])


def test_parquet_with_bytes_paths_and_nested_pictures(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def table(file: str, **columns: list[Any]) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / file)
        return tmp_path / file

    assert listed(table("b.parquet", image=[b"x", b"y"])) == [Sample("b.parquet:1", b"x"), Sample("b.parquet:2", b"y")]
    assert listed(table("p.parquet", image=["a.jpg"])) == [Sample("a.jpg", tmp_path / "a.jpg")]
    nested = table("n.parquet", pic=[{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b.jpg"}], name=["one", "two"])
    assert listed(nested, columns=Columns("pic", "name")) == [Sample("one", b"x"), Sample("two", tmp_path / "b.jpg")]
    with pytest.raises(ConfigError, match=r"no column 'image': name one of pic, name with --image-column"):
        listed(nested)
    assert count([str(tmp_path / "b.parquet")], NO_COLUMNS) == 2


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmv1\[parquet\]'"):
        listed(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_shards_by_brace_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        names = [(f"{number}{i}", kind) for i in range(3) for kind in ("json", "jpg", "seg.png")]
        members = [(f"x/{name}.{kind}", f"{name}{kind}".encode()) for name, kind in names]
        make_tar(tmp_path / f"{number:05d}{suffix}", [*members, ("__index__.txt", b""), ("x/last.json", b"{}")])
    pattern = f"{{00000..00001}}{suffix}"
    found = listed(pattern)
    names = [(n, name) for n in range(2) for name in (f"{n}0", f"{n}1", f"{n}2", "last")]
    assert [sample.key for sample in found] == [f"0000{n}/x/{name}" for n, name in names]
    assert [sample.picture for sample in found[:3]] == [b"00jpg", b"01jpg", b"02jpg"]
    assert fault(found[3]) == "the sample has no picture"
    assert listed(pattern, columns=Columns("seg.png"))[0].picture == b"00seg.png"
    with pytest.raises(ConfigError, match="no file or folder"):
        listed(f"{{00000..00002}}{suffix}")


def test_a_shard_that_is_cut_off_gives_what_came_before(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes([i]) * 5000) for i in range(4)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:14_000])
    found = listed(tmp_path / "a.tar")
    assert [sample.key for sample in found] == ["a/0", "a/1", "a.tar"]
    assert "cannot be read after 2 samples" in fault(found[-1])


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [("0.jpg", bytes(5000)), ("1.jpg", b"x")])
    large, small = listed(tmp_path / "a.tar", limits=ImageLimits(max_encoded_bytes=100, max_pixels=1, max_side=1))
    assert "more than the" in fault(large) and small.picture == b"x"


def test_rows_are_read_when_their_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard's later members are not looked at while the first are worked on."""
    monkeypatch.chdir(tmp_path)
    make_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"x") for i in range(3)])
    good = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(b"no tar file at all" * 100)
    found: Iterator[Sample] = samples(["{a,b}.tar"], NO_COLUMNS, LIMITS)
    assert next(found).key == "a/0"
    (tmp_path / "b.tar").write_bytes(good)  # by the time it is its turn
    assert [sample.key for sample in found] == ["a/1", "a/2", "b/0", "b/1", "b/2"]


@pytest.mark.parametrize("source", ["nowhere", "list.docx"])
def test_what_is_no_source_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.docx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"nowhere|none of what pictures are read from"):
        listed(source)


def test_braces_are_written_out_as_a_shell_does() -> None:
    assert expand_braces("a{08..10}b") == ["a08b", "a09b", "a10b"]
    assert expand_braces("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    assert expand_braces("plain{}") == ["plain{}"]


def test_count_tells_how_many_or_none(tmp_path: Path) -> None:
    make_pictures(tmp_path / "p", 7)
    make_tar(tmp_path / "a.tar", [("0.jpg", b"x")])
    assert count([str(tmp_path / "p")], NO_COLUMNS) == 7
    assert count([str(tmp_path / "p"), str(tmp_path / "p/000.jpg")], NO_COLUMNS) == 8
    assert count([str(tmp_path / "a.tar")], NO_COLUMNS) is None
    assert count([str(tmp_path / "nowhere")], NO_COLUMNS) is None


def test_shares_are_disjoint_complete_and_alike() -> None:
    found = [shard_of(f"{number}.jpg", 4) for number in range(4000)]
    assert {*found} == {0, 1, 2, 3} and all(850 < found.count(index) < 1150 for index in range(4))
    assert found == [shard_of(f"{number}.jpg", 4) for number in range(4000)]


def test_files_of_one_name_in_several_folders_have_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.jpg").write_bytes(folder.encode())
        Path(folder, "x.txt").write_text("x.jpg\n")
        Path(folder, "x.jsonl").write_text('{"image": "x.jpg"}\n{"image": 1}\n')
        make_tar(Path(folder, "x.tar"), [("0.jpg", folder.encode())])
        pyarrow.parquet.write_table(pyarrow.table({"image": [folder.encode()]}), f"{folder}/x.parquet")
    assert keys("a/x.tar") == ["x/0"] and keys("a/x.parquet") == ["x.parquet:1"] and keys("a/x.jsonl")[0] == "x.jpg"
    for kind, expected in [
        ("tar", ["a/x/0", "b/x/0"]),
        ("parquet", ["a/x.parquet:1", "b/x.parquet:1"]),
        ("jsonl", ["a/x.jpg", "a/x.jsonl:2", "b/x.jpg", "b/x.jsonl:2"]),
        ("txt", ["a/x.jpg", "b/x.jpg"]),
    ]:
        assert keys(f"a/x.{kind}", f"b/x.{kind}") == keys(f"{{a,b}}/x.{kind}") == expected
    assert keys("*/x.tar") == ["a/x/0", "b/x/0"]


def test_a_folder_that_cannot_be_read_is_one_fault_among_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path, 4)
    scan = os.scandir

    def forbidding(folder: Path) -> Any:
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", forbidding)
    found = listed(tmp_path)
    assert [sample.key for sample in found] == ["000.jpg", "001.png", "003.png", "sub"]
    assert fault(found[-1]) == "the folder cannot be read (Permission denied)"


@pytest.mark.parametrize("name", ["a\x00.jpg", "\ud800.jpg", "http://\ud800/", "data:\ud800", "x" * 300, "."])
def test_a_row_with_an_impossible_name_has_a_key_that_can_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "id": name}) + "\n")
    for columns in (NO_COLUMNS, Columns(None, "id")):
        (sample,) = listed(tmp_path / "a.jsonl", columns=columns)
        assert sample.key.encode()


def test_a_parquet_file_that_is_damaged_gives_what_can_be_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"%d" % i * 200 for i in range(300)]}), path, row_group_size=100,
                                compression="zstd", use_dictionary=False)  # fmt: skip
    whole = path.read_bytes()
    place = len(whole) // 2
    path.write_bytes(whole[:place] + bytes(300) + whole[place + 300 :])
    found = listed(path)
    assert 64 <= len(found) < 300 and found[-1].key == "a.parquet"
    assert "the file cannot be read after" in fault(found[-1])
    path.write_bytes(b"no table")
    (only,) = listed(path)
    assert "the file cannot be read after 0 rows" in fault(only)


def test_a_list_that_cannot_be_opened_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\n")

    def forbid(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbid)
        with pytest.raises(ConfigError, match=r"list.txt' cannot be read \(Permission denied\)"):
            listed(tmp_path / "list.txt")
    with pytest.raises(ConfigError, match=r"x' cannot be read \(File name too long\)"):
        listed("x" * 300)


def test_pictures_of_one_text_file_are_in_one_share() -> None:
    assert {shard_of(f"a/cat.{kind}", 64) for kind in ("jpg", "png", "webp")} == {shard_of("a/cat.gif", 64)}
