"""Pictures are written whole or not at all, none over another's, whatever the LoRAs are called."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Barrier, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio.errors import LoratorioError
from loratorio.prompt.lora_folder import folded
from loratorio.standalone import output


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("replacing", [True, False])
def test_an_interrupt_between_renames_leaves_all_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: type[BaseException], at: int, replacing: bool
) -> None:
    older = {"b.png": b"older"} if replacing else {}
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    new = {tmp_path / name: name.encode() for name in ("a.png", "b.png", "c.png")}
    rename, calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise stopped(5, "stopped")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    try:
        output.write_all(new, replacing)
    except (KeyboardInterrupt, LoratorioError):
        assert contents(tmp_path) == older
    else:
        assert contents(tmp_path) == {path.name: content for path, content in new.items()}
        assert calls <= at


def test_two_jobs_into_one_folder_lose_nothing(tmp_path: Path) -> None:
    """All at once, with one seed, twenty times."""
    barrier = Barrier(2)
    jobs = 20

    def write(job: int) -> None:
        for turn in range(jobs):
            barrier.wait()
            content = f"{job}-{turn}".encode()
            output.write_numbered(
                tmp_path / "out",
                lambda number, content=content: {  # type: ignore[misc]
                    tmp_path / "out" / f"{number:05}-7{map_}.png": content for map_ in ("", "-map-all")
                },
            )

    threads = [Thread(target=write, args=(job,)) for job in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = contents(tmp_path / "out")
    assert sorted(found.values()) == sorted(
        f"{job}-{turn}".encode() for job in range(2) for turn in range(jobs) for _ in range(2)
    )
    for name, content in found.items():
        assert found[name.split("-7")[0] + "-7-map-all.png"] == content


def test_a_number_that_is_taken_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "00003-1.png").write_bytes(b"older")
    (written,) = output.write_numbered(tmp_path, lambda number: {tmp_path / f"{number:05}-2.png": b"new"})
    assert written.name == "00004-2.png"
    assert contents(tmp_path) == {"00003-1.png": b"older", "00004-2.png": b"new"}


def test_a_lora_called_all_and_long_names() -> None:
    names = ["all", "ALL", "x" * 300, "x" * 301, "a/b\\c:d", "CON", "", "e\u0301" * 100, "all-2"]
    labels = output.file_labels(names, 40, taken=["all"])
    assert labels[:2] == ["all-2", "ALL-3"]
    assert labels[4] == "a-b-c-d"
    assert labels[8] == "all-2-2"
    assert len({folded(each) for each in [*labels, "all"]}) == len(names) + 1
    assert all(len(each.encode()) <= 40 for each in labels)


@given(st.lists(st.text(max_size=60), max_size=12), st.integers(8, 40))
def test_labels_are_short_and_no_two_alike(names: list[str], room: int) -> None:
    labels = output.file_labels(names, room, taken=["all"])
    assert len({folded(each) for each in labels} | {"all"}) == len(names) + 1
    for label in labels:
        assert len(label.encode()) <= room
        assert "/" not in label
        assert "\0" not in label


def test_a_name_of_the_longest_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (output.LONGEST_NAME - 4) + ".png")
    output.write_all({path: b"1"})
    output.write_all({path: b"2"})
    assert contents(tmp_path) == {path.name: b"2"}


@pytest.mark.parametrize(
    "out", ["x" * 300, "x" * 300 + ".png", "file/sub", "file/a.png", "a\0b.png", "folder.png"]
)
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(LoratorioError, match="choose another --out"):
        output.check_writable(tmp_path / out)
