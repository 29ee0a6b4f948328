"""LoRA folders as people have them: links, repeated names, capitals, accents, what cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from loratorio.errors import LoratorioError
from loratorio.prompt.lora_folder import LoraFolder, ambiguous_note


def made(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    return root


def linked(link: Path, to: Path) -> None:
    try:
        os.symlink(to, link)
    except OSError:
        pytest.skip("this system makes no symbolic links")


def names(folder: LoraFolder, files: Sequence[Path] | None = None) -> list[str]:
    return sorted(folder.name_of(file) for file in (folder.files if files is None else files))


def test_linked_subfolders_are_searched(tmp_path: Path) -> None:
    root = made(tmp_path / "Lora", "cat.safetensors")
    made(tmp_path / "elsewhere", "dog.safetensors", "deep/fox.safetensors")
    linked(root / "more", tmp_path / "elsewhere")
    folder = LoraFolder(root)
    assert names(folder) == ["cat", "dog", "fox"]
    assert folder.find("more/dog") == [root / "more" / "dog.safetensors"]
    assert folder.leads_out(folder.find("dog")[0])


def test_links_in_a_circle_end_and_nothing_comes_twice(tmp_path: Path) -> None:
    root = made(tmp_path / "Lora", "a/cat.safetensors", "b/dog.safetensors")
    linked(root / "a" / "up", root)
    linked(root / "b" / "a", root / "a")
    linked(root / "b" / "self", root / "b")
    linked(root / "0-before-the-others", root / "a")
    folder = LoraFolder(root)
    assert names(folder) == ["cat", "dog"]
    assert folder.find("a/cat") == [root / "a" / "cat.safetensors"]


def test_two_files_of_one_name_can_both_be_named(tmp_path: Path) -> None:
    folder = LoraFolder(made(tmp_path, "sub/same.safetensors", "sub2/Same.safetensors", "other.safetensors"))
    assert names(folder) == ["other", "sub/same", "sub2/Same"]
    assert folder.find("sub2/same") == [tmp_path / "sub2" / "Same.safetensors"]
    assert folder.find("sub\\same") == [tmp_path / "sub" / "same.safetensors"]
    found = folder.find("SAME")
    assert found == [tmp_path / "sub" / "same.safetensors", tmp_path / "sub2" / "Same.safetensors"]
    note = ambiguous_note("SAME", found, folder)
    assert "2 LoRA files are called SAME" in note
    assert "sub/same was used" in note
    assert ambiguous_note("other", folder.find("other"), folder) == ""
    # The spelling decides where it can.
    assert folder.find("Same") == [tmp_path / "sub2" / "Same.safetensors"]


def test_a_file_and_a_link_to_it_are_not_ambiguous(tmp_path: Path) -> None:
    root = made(tmp_path, "a/cat.safetensors", "b/dog.safetensors")
    linked(root / "b" / "cat.safetensors", root / "a" / "cat.safetensors")
    folder = LoraFolder(root)
    assert len(folder.find("cat")) == 2
    assert ambiguous_note("cat", folder.find("cat"), folder) == ""


def test_capitals_of_the_extension(tmp_path: Path) -> None:
    folder = LoraFolder(made(tmp_path, "A.SAFETENSORS", "b.SafeTensors", "c.CKPT", "d.txt"))
    assert names(folder) == ["A", "b"]
    assert [file.name for file in folder.pickles] == ["c.CKPT"]
    assert folder.within("*") == folder.within(".") == folder.within("**") == list(folder.files)
    assert folder.within("a.safetensors") == [tmp_path / "A.SAFETENSORS"]


@pytest.mark.parametrize(
    ("on_disk", "asked"),
    [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9"), ("\u00c9t\u00e9", "e\u0301te\u0301")],
)
def test_accents_as_one_character_or_two(tmp_path: Path, on_disk: str, asked: str) -> None:
    folder = LoraFolder(made(tmp_path, f"{on_disk}.safetensors"))
    assert [file.stem for file in folder.find(asked)] == [on_disk]
    assert [file.stem for file in folder.within(f"{asked[:3]}*")] == [on_disk]


def test_what_leads_nowhere_is_passed_over_and_said(tmp_path: Path) -> None:
    root = made(tmp_path, "cat.safetensors")
    linked(root / "gone.safetensors", root / "nothing")
    linked(root / "round.safetensors", root / "round.safetensors")
    (root / "folder.safetensors").mkdir()
    folder = LoraFolder(root)
    assert names(folder) == ["cat"]
    assert "gone.safetensors is a dead link" in folder.cannot_be_read
    assert "round.safetensors is a dead link" in folder.cannot_be_read
    assert LoraFolder(made(tmp_path / "sub", "x.safetensors")).cannot_be_read == ""


def test_a_folder_that_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "Lora", "cat.safetensors", "shut/dog.safetensors")
    shut = str(tmp_path / "Lora" / "shut")
    scan, listing = os.scandir, os.listdir

    def scandir(path: str) -> object:
        if os.fspath(path) == shut:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    def listdir(path: str) -> list[str]:
        if os.fspath(path) == shut:
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    # Whoever runs the tests as root may enter everything.
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", listdir)
    folder = LoraFolder(tmp_path / "Lora")
    assert names(folder) == ["cat"]
    assert "the folder shut (permission denied)" in folder.cannot_be_read
    with pytest.raises(LoratorioError, match=r"cannot be opened \(permission denied\)"):
        LoraFolder(Path(shut))


@pytest.mark.parametrize("path", ["none", "file", "x" * 300, "a\0b"])
def test_no_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoratorioError, match="LoRA folder"):
        LoraFolder(tmp_path / path)


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "../cat", "/etc/passwd", "", ".", "**cat", "[", "cat\udcff"]
)
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    assert LoraFolder(made(tmp_path / "Lora", "cat.safetensors")).find(name) == []


def test_names_that_are_no_utf_8_can_be_printed(tmp_path: Path) -> None:
    try:
        made(tmp_path, os.fsdecode(b"c\xff.safetensors"))
    except OSError:
        pytest.skip("this system has no such names")
    folder = LoraFolder(tmp_path)
    assert names(folder) == ["c?"]
    assert folder.find("c?") == list(folder.files)


def test_many_stars_take_no_time(tmp_path: Path) -> None:
    folder = LoraFolder(made(tmp_path, f"{'a/' * 12}{'a' * 200}.safetensors"))
    assert folder.within("/".join(["**", "*"] * 40)) == []
    assert folder.within("**/" * 200 + "b") == []
    assert folder.within("*a" * 100 + "b") == []
