"""The script, from the WebUI's events to pictures and infotext, against the stand-in of tests/standin/a1111."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratorio.errors import LoratorioError
from loratorio.prompt.roles import TaggedLora
from loratorio.settings import KNOBS, Settings
from tests.published import paper

ROOT = Path(__file__).parent.parent.parent
pytest.importorskip(
    "gradio", reason="the script makes its panel with gradio: install the extra [dev,standalone]"
)


EMPTY = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without tensors."""


@pytest.fixture
def script(standin: Any) -> Any:
    """The script as the WebUI loads it."""
    spec = importlib.util.spec_from_file_location(
        "loratorio_script", ROOT / "scripts" / "loratorio_script.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoratorioScript()


def run(standin: Any, script: Any, args: Any, *loras: Any, **fields: Any) -> tuple[torch.Tensor, Any]:
    p = standin.job(*loras, **fields)
    p.script, p.script_args = script, args
    return standin.run(p), p


def test_by_name_and_by_position(standin: Any, script: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    knobs = {"enabled": True, "method": "loratorio", "patch_size": 3, "temperature": 0.05}
    by_name, p = run(standin, script, [knobs], a, b)
    settings = Settings.from_mapping(knobs)
    by_place, _ = run(standin, script, [getattr(settings, knob.name) for knob in KNOBS], a, b)
    assert torch.equal(by_name, by_place)
    assert not torch.equal(by_name, standin.run(standin.job(a, b)))
    infotext = p.processed.infotexts[0]
    assert "LoRAtorio: True" in infotext
    assert "LoRAtorio patch size: 3" in infotext
    assert "LoRAtorio LoRAs: a:1, b:1" in infotext
    assert "note" not in infotext


def test_a_knob_that_changes_nothing_is_said_under_the_picture(standin: Any, script: Any) -> None:
    loras = standin.lora("a", 1), standin.lora("b", 2)
    knobs = {"enabled": True, "temperature": 0.05}
    with_it, p = run(standin, script, [knobs], *loras)
    without, _ = run(standin, script, [{"enabled": True}], *loras)
    assert torch.equal(with_it, without)
    assert (
        "LoRAtorio note: temperature = 0.05 has no effect with LoRAtorio, relative."
        in p.processed.infotexts[0]
    )


def test_a_finished_job_lets_go_of_its_loras(standin: Any, script: Any, left_over: Any) -> None:
    knobs = {"enabled": True, "weight_maps": True}
    _, p = run(standin, script, [knobs], standin.lora("a", 1), standin.full("b", 2))
    assert left_over() == 0
    assert p.loratorio_job.passes


def test_unticked_does_nothing(standin: Any, script: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    for args in ([], [False], [{"enabled": False}], [{}]):
        samples, p = run(standin, script, args, a, b)
        assert torch.equal(samples, standin.run(standin.job(a, b)))
        assert p.processed.infotexts[0] == ""
        assert p.comments == {}


def test_a_call_that_forgets_to_switch_it_on_is_told_so(standin: Any, script: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    samples, p = run(standin, script, [{"preset": "fast"}], a, b)
    assert torch.equal(samples, standin.run(standin.job(a, b)))
    assert 'Add "enabled": true' in p.processed.infotexts[0]
    assert 'Add "enabled": true' in "".join(p.comments)
    assert "LoRAtorio: " not in p.processed.infotexts[0]


def test_a_picture_without_a_step_says_that_nothing_was_composed(
    standin: Any, a1111: Any, script: Any
) -> None:
    loras = standin.lora("a", 1), standin.lora("b", 2)
    _, p = run(standin, script, [{"enabled": True}], *loras, steps=0)
    assert "the sampler did not call the model in any step" in p.processed.infotexts[0]
    p = standin.job(*loras, script=script, script_args=[{"enabled": True}])
    p.sample = lambda **conds: torch.zeros(1, 4, 8, 8)  # an extension's
    standin.run(p)
    assert "the WebUI did not sample it" in p.processed.infotexts[0]
    a1111.shared.state.interrupted = True
    p = standin.job(*loras, script=script, script_args=[{"enabled": True}])
    with contextlib.suppress(TypeError):  # the stand-in makes no picture of nothing
        standin.run(p)
    a1111.shared.state.interrupted = False
    interrupted = "LoRAtorio composed nothing: interrupted before the first step."
    assert p.extra_generation_params["LoRAtorio note"] == interrupted
    # Before the first batch the WebUI makes an infotext without a picture, of what `process` has written.
    script.process(p, {"enabled": True, "top_k": 3})
    assert p.extra_generation_params["LoRAtorio note"] == interrupted
    assert p.extra_generation_params["LoRAtorio top-k"] == "3"
    script.before_process_batch(p, prompts=p.prompts)
    assert "LoRAtorio note" not in p.extra_generation_params
    script.process(p, {"enabled": False})
    assert p.extra_generation_params == {}


def test_bad_knobs_stop_the_job(standin: Any, script: Any) -> None:
    a = standin.lora("a", 1)
    for knobs in ({"patchsize": 1}, {"enabled": True, "temperature": -1}, {"method": "lora"}):
        with pytest.raises(LoratorioError) as stopped:
            run(standin, script, [knobs], a)
        assert stopped.value.status_code == 422
        assert stopped.value.detail == str(stopped.value)


def test_a_fault_of_ours_stops_the_job(standin: Any, script: Any, monkeypatch: Any) -> None:
    """The WebUI would print it and make another picture than was asked for."""
    from loratorio.hosts.a1111 import A1111

    def fail(self: Any, job: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(A1111, "before_sampling", fail)
    with pytest.raises(ZeroDivisionError):
        run(standin, script, [{"enabled": True}], standin.lora("a", 1))


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("<lora:cat:0,8>", "<lora:cat:0,8> cannot be read: 0,8 is not a number: write <lora:cat:0.8>."),
        ("<lora:cat:abc>", "abc is not a number: write <lora:cat:1>."),
        ("<lyco:cat:1.0:5-15>", "5-15 is not a number: write <lyco:cat:1.0>."),
        ("<pool:*:0,8>", "<pool:*:0,8> cannot be read"),
        ("<lora:te=0.3:unet=1>", "te=0.3 stands where the name of a LoRA should"),
        ("<lora:cat,", "<lora:cat, <lora:dog:1> cannot be read: it has no > at its end"),
        ("<lora:cat:words=mimsy: red>", "a colon in words= must be inside brackets"),
        ("<Lora:cat:1>", "does not read the tag <Lora:cat:1>: write lora in lower case"),
    ],
)
@pytest.mark.parametrize("hires", [False, True])
def test_a_tag_that_the_webui_cannot_read_stops_the_job(
    standin: Any, script: Any, tag: str, why: str, hires: bool
) -> None:
    prompts = ("hill", f"hill {tag} <lora:dog:1>")
    own: dict[str, Any] = {"all_hr_prompts": list(prompts)} if hires else {"prompts": prompts}
    with pytest.raises(LoratorioError) as stopped:
        run(standin, script, [{"enabled": True}], standin.lora("dog", 1), batch_size=2, **own)
    assert why in str(stopped.value)
    run(standin, script, [{}], standin.lora("dog", 1), batch_size=2, **own)


@pytest.mark.parametrize(("script_title", "toasts"), [("X/Y/Z plot", 1), ("Prompt matrix", 0)])
@pytest.mark.parametrize("when", ["before the sampling", "at its first step"])
def test_a_plot_that_leaves_a_stopped_picture_empty_still_says_why(
    standin: Any, script: Any, monkeypatch: Any, script_title: str, toasts: int, when: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr("gradio.Warning", told.append)
    listed = [SimpleNamespace(title=lambda: script_title)]
    tag = "<lora:a:0,8>" if when == "before the sampling" else ""
    p = standin.job(
        standin.lora("a", 1), prompts=(f"hill {tag}",), scripts=SimpleNamespace(selectable_scripts=listed)
    )
    if not tag:
        p.extra_network_data["lora"][0].named["role"] = "stile"
    p.script, p.own_args, p.script_args = script, [{"enabled": True}], [1]
    with pytest.raises(LoratorioError) as stopped:
        standin.run(p)
    assert told == [str(stopped.value)] * toasts


def test_a_tag_of_another_extension_is_its_own_matter(standin: Any, script: Any, monkeypatch: Any) -> None:
    paths = ("sd-webui-loractl/scripts/loractl.py", "sd-webui-lora-block-weight/scripts/lora_block_weight.py")
    loractl, block_weight = (SimpleNamespace(path=f"/extensions/{path}") for path in paths)
    scripts = sys.modules["modules.scripts"]
    monkeypatch.setattr(scripts, "scripts_data", [loractl, block_weight])
    prompts = ("a hill <lora:dog:0@0,1@0.5>",)
    run(standin, script, [{"enabled": True}], standin.lora("dog", 1), prompts=prompts)
    # What none of them reads loses the WebUI all LoRAs.
    for listed, tag in (
        ([loractl, block_weight], "0,8"),
        ([block_weight], "abc"),
        ([block_weight], "0@0,1@0.5"),
    ):
        monkeypatch.setattr(scripts, "scripts_data", listed)
        with pytest.raises(LoratorioError, match="is not a number"):
            run(
                standin, script, [{"enabled": True}], standin.lora("dog", 1), prompts=(f"a <lora:dog:{tag}>",)
            )


def test_own_words_may_have_what_divides_a_tag(standin: Any, script: Any) -> None:
    from loratorio.job import Job
    from loratorio.webui import pools

    words = "(mimsy:1.2), a=b, [red:blue:0.5]"
    written = f"a <lora:cat:words={words}:at=left:1> <hypernet:x:(a:b)>"
    job = Job(standin.job(all_hr_prompts=["b", written]), paper(enabled=True))
    prompts = [written]
    pools.expand(job, prompts)
    cat, hypernet = re.findall("<([^>]*)>", prompts[0])
    kind, name, own, *others = cat.split(":")  # as the WebUI does
    assert [kind, name, *others] == ["lora", "cat", "at=left", "1"]
    assert own.count("=") == 1
    assert TaggedLora("cat", dict([own.split("=")])).words.own == words
    assert hypernet == "hypernet:x:(a:b)"
    assert job.hires_prompts is None  # those of another batch
    job.p.iteration = 1
    pools.expand(job, prompts)
    assert job.p.all_hr_prompts == ["b", prompts[0]]
    pools.restore(job)
    assert job.p.all_hr_prompts == ["b", written]


def test_without_a_lora_it_says_so(standin: Any, script: Any) -> None:
    samples, p = run(standin, script, [{"enabled": True}])
    assert torch.equal(samples, standin.run(standin.job()))
    assert "names no LoRA" in "".join(p.comments)
    assert "names no LoRA" in p.processed.infotexts[0]


def test_a_pass_that_another_extension_makes_by_itself_is_said(standin: Any, script: Any) -> None:
    """Tiled Diffusion's DemoFusion puts a function of its own in the place of the job's `sample`, which fires no event of ours."""
    loras = standin.lora("a", 1), standin.lora("b", 2)
    p = standin.job(*loras)
    sample, p.script, p.script_args = p.sample, script, [{"enabled": True}]

    def sample_past_us(**conditioning: Any) -> torch.Tensor:
        p.script = None
        result: torch.Tensor = sample(**conditioning)
        p.script = script
        return result

    p.sample = sample_past_us
    samples = standin.run(p)
    assert torch.equal(samples, standin.run(standin.job(*loras)))
    assert (
        "another extension, such as Tiled Diffusion's DemoFusion, samples in its own way"
        in p.processed.infotexts[0]
    )


def test_weight_maps_follow_the_pictures(standin: Any, script: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    prompts = ("a red circle AND sea", "a blue square")
    samples, p = run(
        standin, script, [{"enabled": True, "weight_maps": True, "single_maps": True}], a, b, prompts=prompts
    )
    assert len(samples) == 2
    assert len(p.processed.images) == len(p.processed.infotexts) == 2 + 2 * 3
    _, p = run(standin, script, [{"enabled": True, "weight_maps": True}], a, b, prompts=prompts)
    assert len(p.processed.images) == 2 + 2
    pictures, maps = p.processed.infotexts[:2], p.processed.infotexts[2:]
    assert maps == [text + ", LoRAtorio map: True" for text in pictures]
    plain, p = run(standin, script, [{"enabled": True}], a, b, prompts=prompts)
    assert len(p.processed.images) == 2
    assert torch.equal(plain, samples)


@pytest.mark.parametrize("title", ["SD upscale", "Prompt matrix", "Prompt Matrix"])
def test_a_script_that_puts_its_images_together_gets_no_maps_among_them(
    standin: Any, script: Any, title: str
) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    listed = [SimpleNamespace(title=lambda: title)]
    p = standin.job(a, b, scripts=SimpleNamespace(selectable_scripts=listed))
    p.script, p.own_args, p.script_args = script, [{"enabled": True, "weight_maps": True}], [1]
    standin.run(p)
    assert len(p.processed.images) == 1
    assert f"Weight maps are not available with the script {title}" in p.processed.infotexts[0]


def test_pools_become_loras_and_stay_pools_in_the_infotext(
    standin: Any,
    a1111: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    from loratorio.job import Job
    from loratorio.webui import pools

    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(EMPTY)
    monkeypatch.setattr(a1111.shared.cmd_opts, "lora_dir", str(tmp_path))
    p = standin.job(prompts=("a <pool:*:0.5>",), all_hr_prompts=["b <pool:one>"])
    job, written = Job(p, paper(enabled=True)), p.all_hr_prompts
    prompts = list(p.prompts)
    pools.expand(job, prompts)
    assert prompts == ["a <lora:one:0.5:pool=1><lora:two:0.5:pool=1>"]
    assert p.all_hr_prompts == ["b <lora:one:1:pool=1>"]
    pools.restore(job)
    assert p.all_hr_prompts is written
    assert written == ["b <pool:one>"]


def test_the_old_method_meets_no_candidate_of_another_width(
    standin: Any, a1111: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """With `lora_functional` the WebUI multiplies text with a LoRA's layers, and one for another model ends the job."""
    from loratorio.job import Job
    from loratorio.webui import pools

    def load_network(name: str, on_disk: Any) -> Any:
        network = standin.lora(name, 1)
        for key, module in network.modules.items():
            module.sd_module = standin.model.network_layer_mapping[key]
        if name == "wide":
            network.modules["transformer_text"].calc_updown = lambda weight: (torch.zeros(99, 1), None)
        if name == "other":  # which a pass skips, and names
            network.modules["diffusion_model_to_k"].calc_updown = lambda weight: (torch.zeros(99, 1), None)
        return network

    for name in ("one", "other", "wide"):
        (tmp_path / f"{name}.safetensors").write_bytes(EMPTY)
    monkeypatch.setattr(a1111.shared.cmd_opts, "lora_dir", str(tmp_path))
    monkeypatch.setattr(a1111.networks, "load_network", load_network, raising=False)
    for is_old, names in ((False, ("one", "other", "wide")), (True, ("one", "other"))):
        monkeypatch.setattr(a1111.shared.opts, "lora_functional", is_old, raising=False)
        job, prompts = Job(standin.job(), paper(enabled=True)), ["<pool:*>"]
        pools.expand(job, prompts)
        assert prompts == ["".join(f"<lora:{name}:1:pool=1>" for name in names)]
    assert job.notes == ["Not used from the pool, because they cannot be read or do not fit: wide."]


def test_of_files_with_one_name_a_pool_finds_the_one_that_it_means(
    standin: Any, a1111: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from loratorio.job import Job
    from loratorio.webui import pools

    network, networks = sys.modules["network"], a1111.networks
    folder, other = tmp_path / "Lora", tmp_path / "LyCORIS"
    files = {}
    for path in ("sub/same", "sub2/same", "new", "a,b", "a:b"):
        files[path] = folder / f"{path}.safetensors"
        files[path].parent.mkdir(parents=True, exist_ok=True)
        files[path].write_bytes(EMPTY)
    other.mkdir()
    (other / "fish.safetensors").write_bytes(EMPTY)
    monkeypatch.setattr(a1111.shared.cmd_opts, "lora_dir", str(folder))
    monkeypatch.setattr(a1111.shared.cmd_opts, "lyco_dir_backcompat", str(other), raising=False)
    # The WebUI knows the last of them by their name, and nothing of a file that is new.
    known = {"same": network.NetworkOnDisk("same", str(files["sub2/same"]))}
    known["fish"] = network.NetworkOnDisk(
        "fish", str(other / "fish.safetensors"), {"modelspec.title": "LCM fish"}
    )
    monkeypatch.setattr(networks, "available_network_aliases", dict(known))
    monkeypatch.setattr(networks, "available_networks", dict(known))

    def tags(prompt: str) -> list[str]:
        job = Job(standin.job(), paper(enabled=True))
        prompts = [prompt]
        pools.expand(job, prompts)
        return [tag.split(":")[1] for tag in prompts[0].split("<") if tag]

    assert tags("<Pool:sub2/sam*>") == ["same"]
    assert tags("<pool:sub/sam*:0.5>") == ["./sub/same"]
    assert networks.available_network_aliases["./sub/same"].filename == str(files["sub/same"])
    assert tags("<pool:new>") == ["new"]
    assert pools.is_new("new")
    assert not pools.is_new("nowhere")
    assert "new" not in networks.available_network_aliases
    assert sorted(tags("<pool:a?b>")) == ["./a_b", "./a_b_"]
    found = {networks.available_network_aliases[name].filename for name in ("./a_b", "./a_b_")}
    assert found == {str(files["a,b"]), str(files["a:b"])}
    # A file that cannot be opened is no candidate, and said.
    (folder / "damaged.safetensors").write_bytes(b"x")
    job = Job(standin.job(), paper(enabled=True))
    pools.expand(job, ["<pool:damaged,new>"])
    assert job.notes == ["Not used from the pool, because they cannot be read or do not fit: damaged."]
    assert pools.count("*") == 5  # fish says of itself that it is a speed LoRA
    assert sorted(tags("<pool:*>")) == ["./a_b", "./a_b_", "./sub/same", "new", "same"]


def test_installing_needs_nothing(capsys: Any) -> None:
    spec = importlib.util.spec_from_file_location("loratorio_install", ROOT / "install.py")
    assert spec is not None
    assert spec.loader is not None
    start = time.perf_counter()
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert time.perf_counter() - start < 5
    assert capsys.readouterr().out == ""
