"""Both commands as a user types them, and every bad input: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loratorio.compose.methods import METHODS
from loratorio.settings import KNOBS
from loratorio.standalone import cli, output
from loratorio.standalone.checkpoint import load_checkpoint
from tests import tiny

PROMPT = "a red circle <lora:rose:0.8> <lora:dusk:0.5>"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``sd`` and LoRAs in ``loras``, good and bad."""
    root = tmp_path_factory.mktemp("studio")
    model = load_checkpoint(tiny.save_sd(root / "sd"))
    xl = load_checkpoint(tiny.save_sdxl(root / "sdxl"))
    loras = root / "loras"
    for seed, name in enumerate(("rose", "dusk")):
        tiny.save_kohya(
            loras / f"{name}.safetensors", model.unet, model.text_encoders[0], size=0.1, seed=seed
        )
    tiny.save_kohya(loras / "forxl.safetensors", xl.unet)
    (loras / "cut.safetensors").write_bytes((loras / "rose.safetensors").read_bytes()[:5000])
    (loras / "evil.pt").write_bytes(b"\x80\x04.")
    (loras / "evil2.ckpt").write_bytes(b"\x80\x04.")
    sick = load_file(loras / "rose.safetensors")
    next(value for name, value in sick.items() if "up" in name).view(-1)[0] = torch.nan
    save_file(sick, loras / "sick.safetensors")
    return root


@pytest.fixture
def run(
    studio: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``loratorio COMMAND PROMPT OPTIONS`` on the small model; gives exit code, stdout and stderr."""

    def typed(command: str, prompt: str = PROMPT, *options: str) -> tuple[int, str, str]:
        common = [
            "--checkpoint",
            str(studio / "sd"),
            "--lora-dir",
            str(studio / "loras"),
            "--out",
            str(tmp_path / "out"),
        ]
        common += ["--steps", "2", "--cfg", "3", "--device", "cpu"]
        code = cli.main([command, prompt, *common, *options])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return typed


def pictures(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "out").iterdir()) if (folder / "out").exists() else []


def test_generate(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, printed, _ = run(
        "generate", PROMPT, "--weight-maps", "--single-maps", "--batch", "2", "--seed", "5", "--size", "64x72"
    )
    assert code == 0
    maps = [f"0000{i}-{5 + i}-map-{name}.png" for i in (0, 1) for name in ("all", "dusk", "rose")]
    assert pictures(tmp_path) == sorted([*maps, "00000-5.png", "00001-6.png"])
    assert len(printed.splitlines()) == 8
    picture = Image.open(tmp_path / "out" / "00001-6.png")
    assert picture.size == (64, 72)
    text = picture.text["parameters"]
    assert text.startswith(
        f"{PROMPT}\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 6, Size: 64x72, Model: sd, LoRAtorio: True,"
    )
    assert 'LoRAtorio LoRAs: "rose:0.8, dusk:0.5 as style"' in text
    # Older pictures are never written over.
    assert run("generate", PROMPT)[0] == 0
    assert pictures(tmp_path)[-1] == "00002-0.png"


def test_loras_called_all_long_ambiguous_or_behind_a_link(
    run: Callable[..., tuple[int, str, str]], studio: Path, tmp_path: Path
) -> None:
    """What a LoRA is called costs no picture, no overview map, and no other LoRA's map."""
    rose, own, long = studio / "loras" / "rose.safetensors", tmp_path / "loras", "x" * 240
    for name in ("all", long, "sub/same", "sub2/same"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(rose, own / f"{name}.safetensors")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(rose, tmp_path / "elsewhere" / "far.SAFETENSORS")
    os.symlink(tmp_path / "elsewhere", own / "linked")
    prompt = f"a <lora:All:0.5> <lora:{long}> <lora:sub2/same> <lora:same> <lora:far>"
    code, printed, said = run("generate", prompt, "--weight-maps", "--single-maps", "--lora-dir", str(own))
    assert code == 0, said
    assert "2 LoRA files are called same: sub/same, sub2/same. sub/same was used" in said
    names = [Path(line).name for line in printed.splitlines()]
    assert len({*names}) == len(names) == 7
    assert names[:3] == ["00000-0.png", "00000-0-map-all.png", "00000-0-map-All-2.png"]
    assert pictures(tmp_path) == sorted(names)


def test_a_prompt_that_is_no_utf_8(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for options in ((os.fsdecode(b"a \xff circle"),), (PROMPT, "--negative", os.fsdecode(b"\xe9t\xe9"))):
        code, _, said = run("generate", *options)
        assert code == 2
        assert "is not UTF-8 text" in said
    assert pictures(tmp_path) == []


def test_compare_methods_and_values(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run("compare")[0] == 0
    assert run("compare", PROMPT, "--by", "patch-size", "--values", "1,2,8", "--batch", "2")[0] == 0
    assert pictures(tmp_path) == ["00000-by-method.png", "00001-by-patch-size.png"]
    methods, sizes = (Image.open(tmp_path / "out" / name) for name in pictures(tmp_path))
    assert methods.width > len(METHODS) * 256 > sizes.width > 3 * 256
    assert sizes.height > 2 * 256


def test_to_a_named_file_with_img2img(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "teal").save(tmp_path / "in.jpg")
    options = (
        "--init-image",
        str(tmp_path / "in.jpg"),
        "--strength",
        "0.5",
        "--out",
        str(tmp_path / "p.png"),
    )
    assert run("generate", PROMPT, *options)[0] == 0
    assert "Denoising strength: 0.5" in Image.open(tmp_path / "p.png").text["parameters"]


def test_no_lora_is_the_plain_picture(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, said = run("generate", "a red circle")
    assert code == 0
    assert "no <lora:name> in the prompt" in said
    assert "LoRAtorio:" not in Image.open(tmp_path / "out" / "00000-0.png").text["parameters"]


def test_one_lora(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("generate", "a <lora:rose>")[0] == 0


BAD = {
    "not found": (["generate", "a <lora:rosa>"], r"LoRA rosa is not in .*closest names are: rose"),
    "other architecture": (
        ["generate", "a <lora:forxl>"],
        r"LoRA forxl does not fit the layer \S+: its matrices are \S+ and \S+, the model's weight \S+",
    ),
    "cut short": (["generate", "a <lora:cut>"], r"LoRA cut cannot be read: .* damaged or incomplete"),
    "pickle": (["generate", "a <lora:evil>"], r"LoRA evil is a pickle \(evil\.pt\)"),
    "another pickle": (["generate", "a <lora:evil2>"], r"LoRA evil2 is a pickle"),
    "NaN": (["generate", "a <lora:sick>"], r"LoRA sick contains NaN or infinite numbers in the layer"),
    "patch": (
        ["generate", PROMPT, "--patch-size", "9"],
        r"--patch-size is 9, but the latent of a 64×64 picture is only 8×8",
    ),
    "patch at all": (["generate", PROMPT, "--patch-size", "0"], r"--patch-size must be from 1 to"),
    "temperature 0": (["generate", PROMPT, "--temperature", "0"], r"--temperature must be from 0\.0001"),
    "temperature -1": (["generate", PROMPT, "--temperature=-1"], r"--temperature must be from 0\.0001"),
    "temperature nan": (
        ["generate", PROMPT, "--temperature", "nan"],
        r"--temperature must be a number, not 'nan'",
    ),
    "method": (["generate", PROMPT, "--method", "mrege"], r"--method must be one of .*did you mean merge"),
    "sampler": (["generate", PROMPT, "--sampler", "ddm"], r"--sampler must be one of .*did you mean ddim"),
    "size": (["generate", PROMPT, "--size", "100"], r"--size must be divisible by 8, not 100"),
    "size in words": (
        ["generate", PROMPT, "--size", "big"],
        r"--size must be like 512 or 512x768, not 'big'",
    ),
    "steps": (["generate", PROMPT, "--steps", "many"], r"--steps must be a whole number, not 'many'"),
    "device": (["generate", PROMPT, "--device", "tpu"], r"The device must be auto, cpu, cuda, cuda:1 or mps"),
    "dtype": (["generate", PROMPT, "--dtype", "int4"], r"The dtype must be auto, fp32, fp16 or bf16"),
    "no checkpoint": (
        ["generate", PROMPT, "--checkpoint", "none.safetensors"],
        r"There is no checkpoint none\.safetensors",
    ),
    "pickled checkpoint": (
        ["generate", PROMPT, "--checkpoint", "{loras}/evil2.ckpt"],
        r"is a pickle \(evil2\.ckpt\)",
    ),
    "no picture": (["generate", PROMPT, "--init-image", "none.png"], r"There is no picture none\.png"),
    "bad picture": (["generate", PROMPT, "--init-image", "{loras}/evil.pt"], r"cannot be read as a picture"),
    "start after end": (
        ["generate", PROMPT, "--start", "0.8", "--end", "0.2"],
        r"--start \(0\.8\) is after --end",
    ),
    "compare by what changes nothing": (
        ["compare", PROMPT, "--by", "temperature", "--values", "0.1,0.2"],
        r"--temperature has no effect with --method relative\. The methods that use it: loratorio",
    ),
    "compare by nothing": (
        ["compare", PROMPT, "--by", "colour"],
        r"--by must be one of preset, method, patch-size",
    ),
    "compare by what a sheet has no room for": (
        ["compare", PROMPT, "--by", "weight-maps"],
        r"--by must be one of",
    ),
    "compare places by all methods": (
        ["compare", "a <lora:rose:at=left> <lora:dusk>"],
        r"Places .* do not work with .*\. Choose ",
    ),
    "a preset there is not": (
        ["generate", PROMPT, "--preset", "quick"],
        r"--preset must be one of paper, balanced, fast, not 'quick'",
    ),
    "compare by a preset there is not": (
        ["compare", PROMPT, "--by", "preset", "--values", "fast,quick"],
        r"--values must be one of paper, balanced, fast, not 'quick'",
    ),
    "compare without values": (
        ["compare", PROMPT, "--by", "temperature"],
        r"Give the values of --temperature",
    ),
    "compare bad value": (
        ["compare", PROMPT, "--by", "temperature", "--values", "0.1,x"],
        r"--values must be a number, not 'x'",
    ),
    "a size that no machine has": (
        ["generate", PROMPT, "--size", "8000000"],
        r"--size must be from 8 to 8192, not 8000000",
    ),
    "no steps": (["generate", PROMPT, "--steps", "0"], r"--steps must be from 1 to 1000, not 0"),
    "a seed out of range": (["generate", PROMPT, "--seed", str(2**63 - 1)], r"--seed must be from 0"),
    "a tag that is not closed": (
        ["generate", "<lora:rose> a <lora:dusk"],
        r"<lora:dusk is not a complete tag: write it like <lora:name:0\.8>",
    ),
    "a role there is not": (["generate", "a <lora:rose:role=stile>"], r"did you mean style"),
    "a place there is not": (["generate", "a <lora:rose:at=lft>"], r"did you mean left"),
    "a place without rows of its own": (
        ["generate", "a <lora:rose:at=left> <lora:dusk>", "--method", "merge"],
        r"Places .* do not work with Merge\. Choose ",
    ),
    "no such pool": (["generate", "a <pool:hats/*>"], r"No LoRA matches"),
    "no LoRA folder": (["generate", PROMPT, "--lora-dir", "none"], r"There is no LoRA folder none"),
    "no configuration": (["generate", PROMPT, "--config", "none.yaml"], r"no model configuration none\.yaml"),
}

LATE = ("other architecture", "NaN", "patch")
"""What only the model itself can tell."""


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run: Callable[..., tuple[int, str, str]], studio: Path, tmp_path: Path, case: str) -> None:
    typed, says = BAD[case]
    code, printed, said = run(*[word.replace("{loras}", str(studio / "loras")) for word in typed])
    assert code == 2
    assert printed == ""
    sentence = said.strip().splitlines()[-1]
    assert re.search(f"^loratorio: .*{says}", sentence), sentence
    assert pictures(tmp_path) == []
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_torch_is_there(studio: Path, tmp_path: Path) -> None:
    """In a process of its own, as torch is there in this one."""
    common = ["--checkpoint", str(studio / "sd"), "--lora-dir", str(studio / "loras"), "--out", str(tmp_path)]
    need_engine = ("a place without rows of its own", "compare places by all methods")
    typed = [
        [word.replace("{loras}", str(studio / "loras")) for word in [*words[:2], *common, *words[2:]]]
        for name, (words, _) in BAD.items()
        if name not in (*LATE, *need_engine)
    ]
    typed += [["demo", "--steps", "0"], ["demo", "--serve", "--port", "99999"], ["demo", "--seed", "x"]]
    program = (
        "import json, sys\n"
        "from loratorio.standalone.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 2, words\n"
        "    assert not {'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(typed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences = done.stderr.splitlines()
    assert len(sentences) == len(typed)
    assert "--steps must be from 1 to 1000, not 0" in sentences[-3]
    assert "--port must be from 1 to 65535, not 99999" in sentences[-2]
    assert "--seed must be a whole number, not 'x'" in sentences[-1]


NO_EFFECT = {
    "single maps": (["--single-maps"], "--single-maps has no effect without --weight-maps."),
    "maps of merging": (["--weight-maps", "--method", "merge"], "There are no weight maps: Merge does not"),
    "strength": (["--strength", "0.5"], "--strength has no effect without --init-image."),
    "no guidance": (["--cfg", "1", "--negative", "bad"], "--negative has no effect with --cfg 1"),
    "no pool": (["--pool-size", "2"], "--pool-size has no effect without a <pool:…> tag."),
    "no places": (["--yielding", "0"], "--yielding has no effect unless some LoRAs have a place"),
    "no other places": (["--no-own-words"], "--own-words has no effect unless several LoRAs have a place"),
    "a folder": (["--config", "{sd}"], "--config has no effect with a folder as --checkpoint."),
    "few steps": (["--reuse", "2", "--cfg", "1"], "--reuse has no effect in 9 steps or fewer with --cfg 1"),
    "nothing to find": (["--find-after", "3"], "--find-after has no effect without at=auto."),
    "another method": (["--temperature", "0.5"], "--temperature = 0.5 has no effect with "),
    "no step": (
        ["--start", "0.5", "--end", "0.5"],
        "The LoRAs were merged: --start = 0.5 and --end = 0.5 leave none of the 2 steps to compose.",
    ),
}


@pytest.mark.parametrize("case", NO_EFFECT)
def test_what_changes_nothing_is_said(
    run: Callable[..., tuple[int, str, str]], studio: Path, case: str
) -> None:
    options, says = NO_EFFECT[case]
    code, _, said = run("generate", PROMPT, *[word.replace("{sd}", str(studio / "sd")) for word in options])
    assert code == 0
    assert [line for line in said.splitlines() if line.startswith(f"loratorio: {says}")], said


def test_nothing_is_said_where_all_counts(run: Callable[..., tuple[int, str, str]]) -> None:
    options = ("--weight-maps", "--single-maps", "--patch-size", "1", "--recentre", "1", "--negative", "bad")
    assert "loratorio:" not in run("generate", PROMPT, *options)[2]


def test_knobs_without_effect_when_comparing(run: Callable[..., tuple[int, str, str]]) -> None:
    options = ("--by", "preset", "--top-k", "1", "--weight-maps", "--temperature", "0.2")
    code, _, said = run("compare", PROMPT, *options)
    assert code == 0
    assert "--top-k has no effect: --by preset sets it for each column." in said
    assert "--weight-maps has no effect with compare" in said
    assert "--temperature" not in said  # Paper has it


def test_a_lora_of_strength_0_has_one_note(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = run("generate", "a <lora:rose:0>")
    assert code == 0
    assert "LoRA rose has no effect (strength 0" in said
    assert "no <lora:name> in the prompt" not in said


def test_a_named_picture_is_never_written_over(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "p.png").write_bytes(b"older")
    options = ("--out", str(tmp_path / "p.png"))
    for command, made in (("generate", "p-2.png"), ("compare", "p-3.png"), ("generate", "p-4.png")):
        code, printed, _ = run(command, PROMPT, *options, *(["--by", "preset"] * (command == "compare")))
        assert code == 0
        assert printed.split() == [str(tmp_path / made)]
    assert (tmp_path / "p.png").read_bytes() == b"older"
    code, printed, _ = run("generate", PROMPT, *options, "--weight-maps")
    assert [Path(line).name for line in printed.splitlines()] == ["p-5.png", "p-5-map-all.png"]


def test_a_second_demo_goes_into_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "demo" / "contact-sheet.png"
    older.parent.mkdir()
    older.write_bytes(b"older")
    assert cli.main(["demo", "--steps", "1", "--out", str(older.parent)]) == 0
    assert older.read_bytes() == b"older"
    made = {file.name for file in (tmp_path / "demo-2").iterdir()}
    assert {"contact-sheet.png", "two-characters.png", *(f"method-{name}.png" for name in METHODS)} <= made
    assert str(tmp_path / "demo-2") in capsys.readouterr().out


def test_examples_of_help_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the toybox, as they stand there, but in two steps."""
    monkeypatch.chdir(tmp_path)
    for command in ("generate", "compare"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        examples = re.findall(r"^  loratorio (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert len(examples) >= 2
        for example in examples:
            assert cli.main([*shlex.split(example), "--steps", "2"]) == 0
            assert all(Path(name).exists() for name in capsys.readouterr().out.splitlines())


def test_every_option_of_help_names_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "generate", "compare"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        for option in re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]:
            if not option.startswith(("-h", "--serve")):
                assert "(default:" in " ".join(option.split()), option


def test_without_the_libraries_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def gone(self: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr("loratorio.standalone.model.ModelFiles.load", gone)
    assert cli.main(["generate", "a <lora:octopus>"]) == 2
    assert "diffusers is not installed" in capsys.readouterr().err


def test_a_full_disk(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "out" / "00000-0.png"
    kept.parent.mkdir()
    kept.write_bytes(b"older")
    synced = os.fsync
    count = iter(range(10))

    def full(file: int) -> None:
        if next(count) == 1:  # the first file still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    monkeypatch.setattr(output.os, "fsync", full)
    code, printed, said = run("generate", PROMPT, "--batch", "2")
    assert code == 2
    assert "is full" in said
    assert printed == ""
    assert pictures(tmp_path) == ["00000-0.png"]
    assert kept.read_bytes() == b"older"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "a.png"

    def to_full(path: Path, mode: str) -> object:
        return open("/dev/full", mode)

    monkeypatch.setattr(output, "open", to_full, raising=False)
    with pytest.raises(output.LoratorioError, match="is full"):
        output.write_all({target: b"x" * 100000})
    assert not target.parent.exists()


def test_a_folder_that_is_a_file(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    code, _, said = run("generate")
    assert code == 2
    assert "is a file" in said
    assert (tmp_path / "out").read_text() == "in the way"


def test_help_names_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for knob in KNOBS:
        if knob.name != "enabled":
            assert knob.option in text
    for option in (
        "--checkpoint",
        "--lora-dir",
        "--steps",
        "--cfg",
        "--sampler",
        "--seed",
        "--size",
        "--batch",
    ):
        assert option in text


def read_until(terminal: int, wanted: bytes, seconds: float) -> bytes:
    """What a process writes to its terminal, until it has written this, ends, or the seconds are over."""
    shown = b""
    until = time.monotonic() + seconds
    while wanted not in shown and (left := until - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # Linux says so where the other end is closed.
                break
    return shown


def generating(studio: Path, out: Path, steps: int) -> list[str]:
    """The command for a process of its own that makes a picture."""
    return [
        *(sys.executable, "-W", "ignore", "-m", "loratorio", "generate", PROMPT, "--device", "cpu"),
        *("--checkpoint", str(studio / "sd"), "--lora-dir", str(studio / "loras")),
        *("--steps", str(steps), "--out", str(out)),
    ]


def test_a_log_holds_no_progress_bar(studio: Path, tmp_path: Path) -> None:
    done = subprocess.run(generating(studio, tmp_path / "out", 2), capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert b"step/s" not in done.stderr
    assert b"\r" not in done.stderr


def test_ctrl_c_leaves_no_half_written_file(studio: Path, tmp_path: Path) -> None:
    """The command in a process of its own, interrupted while it samples."""
    command = generating(studio, tmp_path / "out", 1000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    terminal, end = pty.openpty()  # The bar, which says that it samples, is drawn in a terminal alone.
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    # A shell that runs the tests in the background has them ignore Ctrl-C, and children would inherit that.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL, env=environment)
    finally:
        signal.signal(signal.SIGINT, ignored)
        os.close(end)
    try:
        shown = read_until(terminal, b"step/s", seconds=240)
        process.send_signal(signal.SIGINT)
        rest = read_until(terminal, b"stopped", seconds=120)
        process.wait(timeout=120)
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 130, shown + rest
    assert b"stopped" in rest
    assert pictures(tmp_path) == []
