"""Which files a pool names, and that it never leaves the LoRA folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratorio.errors import LoratorioError
from loratorio.prompt.pool import expanded, pool_files
from loratorio.prompt.roles import TaggedLora, participants_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loras = tmp_path / "Lora"
    for name in ("cat", "dog", "hats/red", "hats/blue", "hats/old/tall"):
        file = loras / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (loras / "hats" / "notes.txt").write_text("no LoRA")
    (loras / "hats" / "bad.ckpt").write_bytes(b"x")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    return loras


def names(files: list[Path]) -> list[str]:
    return sorted(file.stem for file in files)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("hats", ["blue", "red", "tall"]),
        ("hats/", ["blue", "red", "tall"]),
        ("hats/*", ["blue", "red"]),
        ("**/*", ["blue", "cat", "dog", "red", "tall"]),
        ("*", ["blue", "cat", "dog", "red", "tall"]),
        ("c*", ["cat"]),
        ("*at", ["cat"]),
        ("**at", ["cat"]),
        ("**/*al*", ["tall"]),
        ("**/t?ll", ["tall"]),
        ("hats/**", ["blue", "red", "tall"]),
        ("HATS/R*", ["red"]),
        ("Tall", ["tall"]),
        ("[cd]*", ["cat", "dog"]),
        ("cat", ["cat"]),
        ("tall", ["tall"]),
        ("hats/old/tall.safetensors", ["tall"]),
        ("cat, dog,hats/r*", ["cat", "dog", "red"]),
        ("hats\\old", ["tall"]),
        (".", ["blue", "cat", "dog", "red", "tall"]),
    ],
)
def test_what_a_pool_names(folder: Path, pattern: str, expected: list[str]) -> None:
    assert names(pool_files(pattern, folder)) == expected


def test_loras_of_the_prompt_are_left_out(folder: Path) -> None:
    assert names(pool_files("hats", folder, known=["Red"])) == ["blue", "tall"]


@pytest.mark.parametrize(
    "pattern", ["../*", "..", "/etc", "hats/../../secret", "C:\\loras", "hats/../../*", "cat,../secret"]
)
def test_a_pool_stays_inside_the_folder(folder: Path, pattern: str) -> None:
    with pytest.raises(LoratorioError, match="is outside the LoRA folder"):
        pool_files(pattern, folder)


def test_links_that_lead_out_are_not_followed(folder: Path, tmp_path: Path) -> None:
    try:
        os.symlink(tmp_path / "secret.safetensors", folder / "hats" / "link.safetensors")
        os.symlink(tmp_path, folder / "up")
    except OSError:
        pytest.skip("this system makes no symbolic links")
    assert names(pool_files("hats", folder)) == ["blue", "red", "tall"]
    assert "secret" not in names(pool_files("**/*", folder))
    assert "secret" not in names(pool_files("*", folder))
    for pattern in ("up", "link", "up/secret"):
        with pytest.raises(LoratorioError, match=r"links to .*, outside the LoRA folder"):
            pool_files(pattern, folder)


@pytest.mark.parametrize(
    "pattern", ["nothing", "empty/*", "cat,nothing", "x" * 300, "a\0b", "[", "**[", "ats/red"]
)
def test_a_pattern_that_fits_nothing(folder: Path, pattern: str) -> None:
    with pytest.raises(LoratorioError, match="No LoRA matches"):
        pool_files(pattern, folder)


def test_an_empty_pattern(folder: Path) -> None:
    with pytest.raises(LoratorioError, match="needs a folder"):
        pool_files(" , ", folder)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(LoratorioError, match="no LoRA folder"):
        pool_files("*", tmp_path / "none")


def test_a_pool_tag_becomes_lora_tags_for_hosts_that_know_only_those(folder: Path) -> None:
    (folder / "hats" / "lcm-lora.safetensors").write_bytes(b"x")
    prompt = "a cat <lora:red:0.5> <pool:hats:0.8> in <pool:cat>"
    assert expanded(prompt, folder) == (
        "a cat <lora:red:0.5> <lora:blue:0.8:pool=1><lora:tall:0.8:pool=1> in <lora:cat:1:pool=1>"
    )
    assert expanded("no pool <lora:cat>", folder) == "no pool <lora:cat>"
    with pytest.raises(LoratorioError, match="is outside the LoRA folder"):
        expanded("<pool:../*>", folder)


def test_a_tag_says_that_its_lora_is_a_candidate() -> None:
    participants = participants_of(
        [TaggedLora("cat"), TaggedLora("red", {"pool": "1"}), TaggedLora("tall", {"pool": "0"})]
    )
    assert [lora.pooled for lora in participants.loras] == [False, True, False]


def test_several_folders_are_one(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "LyCORIS"
    other.mkdir()
    (other / "fish.safetensors").write_bytes(b"x")
    both = [folder, tmp_path / "none", other]
    assert names(pool_files("*", both)) == ["blue", "cat", "dog", "fish", "red", "tall"]
    assert names(pool_files("hats/r*, fish", both)) == ["fish", "red"]
    with pytest.raises(LoratorioError, match="No LoRA matches 'bird'"):
        pool_files("fish, bird", both)
    with pytest.raises(LoratorioError, match=r"<pool:\*> is empty"):
        pool_files("*", [tmp_path / "none", tmp_path / "neither"])


def test_a_host_may_have_other_names(folder: Path) -> None:
    found = expanded(
        "<Pool:hats:0.5>",
        folder,
        lambda file: file.relative_to(folder).with_suffix("").as_posix(),
        lambda file: file.stem != "tall",
    )
    assert found == "<lora:hats/blue:0.5:pool=1><lora:hats/red:0.5:pool=1>"
