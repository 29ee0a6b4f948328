"""A WebUI's prompts in the form that it can read: pools replaced by their LoRAs, own words without separators of a tag's parts."""

from __future__ import annotations

import sys
from functools import cache, partial
from glob import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import LoratorioError
from ..prompt.lora_folder import LoraFolder
from ..prompt.pool import expanded, has_pool, pool_files
from ..prompt.roles import looks_like_speed_lora, skipped_note
from ..prompt.tags import LORACTL, for_webui

if TYPE_CHECKING:
    from ..job import Job


def expand(job: Job, prompts: list[str]) -> None:
    """Replace each `<pool:…>` in a batch's prompts, and in those of its hires pass, by its LoRAs, and rewrite parts of LoRA tags that
    the WebUI could not read.

    Raises:
        LoratorioError: a tag that cannot be read, or a pool that leaves the LoRA folders or matches no LoRA.
    """
    p = job.p
    hires = getattr(p, "all_hr_prompts", None) or []
    skipped: dict[str, None] = {}

    @cache  # the pictures of a batch mostly have one prompt, and each expansion reads the folders and opens the files
    def expanded_of(prompt: str) -> str:
        prompt = for_webui(prompt, has_loractl())
        if not has_pool(prompt):
            return prompt
        return expanded(prompt, folders(), _name_of, partial(_is_usable, skipped=skipped))

    # The infotext keeps the tag: it is made from the job's prompts, and these are copies.
    changed = [*map(expanded_of, prompts)]
    if changed != list(prompts):
        prompts[:] = changed
    own = slice(p.iteration * p.batch_size, (p.iteration + 1) * p.batch_size) if hires else slice(0)
    changed = [*map(expanded_of, hires[own])]
    if changed != list(hires[own]):
        # These are not copies, so they must be restored later.
        job.hires_prompts = hires
        p.all_hr_prompts = list(hires)
        p.all_hr_prompts[own] = changed
    if skipped:
        job.note(skipped_note(list(skipped)))


def has_loractl() -> bool:
    """Whether the extension loractl is loaded, which reads strengths that change from step to step."""
    scripts = getattr(sys.modules.get("modules.scripts"), "scripts_data", ())
    return any(LORACTL in str(getattr(script, "path", "")).lower() for script in scripts)


def restore(job: Job) -> None:
    """After the WebUI has read the batch's prompts, restore the job's own prompts for the infotext."""
    if job.hires_prompts is not None:
        job.p.all_hr_prompts, job.hires_prompts = job.hires_prompts, None


def count(pattern: str) -> int:
    """How many candidates a pool has. Raises LoratorioError as `expand`."""
    return sum(_is_candidate(file, {}) for file in pool_files(pattern, folders()))


def is_new(name: str) -> bool:
    """Whether a LoRA is in the WebUI's folders but not yet in its list. The WebUI itself finds such a LoRA when it is used."""
    for folder in folders():
        try:
            if LoraFolder(folder).find(name):
                return True
        except LoratorioError:
            continue
    return False


def folders() -> list[Path]:
    """The folders in which the WebUI looks for LoRAs."""
    from modules.shared import cmd_opts

    several = getattr(cmd_opts, "lora_dirs", None) or ()
    older = getattr(cmd_opts, "lyco_dir_backcompat", None)
    found = [cmd_opts.lora_dir, *several, *([older] if older else [])]
    return [Path(folder) for folder in dict.fromkeys(map(str, found))]


def _is_usable(file: Path, skipped: dict[str, None]) -> bool:
    """Whether the WebUI can use a candidate. `skipped` gets the names of those that it cannot."""
    if not _is_candidate(file, skipped):
        return False
    if not _fits_text_encoder(file):
        skipped[file.stem] = None
        return False
    return True


def _fits_text_encoder(file: Path) -> bool:
    """Whether a file's layers for the text encoder have the model's widths.

    Only asked with A1111's option "use old method" (`lora_functional`), with which a misfit ends the job while the text is encoded.
    Otherwise the WebUI skips such layers, and a pass skips such candidates.
    """
    import networks
    from modules import shared

    if not getattr(shared.opts, "lora_functional", False):
        return True
    try:
        network = networks.load_network(file.stem, SimpleNamespace(filename=str(file)))
    except Exception:  # whatever the WebUI's reader raises: it continues without this LoRA
        return True
    for module in network.modules.values():
        weight = getattr(module.sd_module, "weight", None)
        if weight is None or module.sd_key.startswith("diffusion_model"):
            continue
        try:
            if module.calc_updown(weight)[0].shape != weight.shape:
                return False
        except RuntimeError:
            return False
    return True


def _is_candidate(file: Path, damaged: dict[str, None]) -> bool:
    """Whether a file can be one of a pool's: it is no speed LoRA, and can be opened. `damaged` gets the names of those that cannot.

    A Forge that meets a single damaged file takes none of the prompt's LoRAs.
    """
    from safetensors import SafetensorError, safe_open

    if _is_speed_lora(file):
        return False
    try:
        with safe_open(str(file), framework="pt"):
            return True
    except (OSError, SafetensorError):
        damaged[file.stem] = None
        return False


def _name_of(file: Path) -> str:
    """A name by which the WebUI finds this very file.

    It knows a file by its name without folders, of which the last one found counts. A file that it would not find so, or whose name
    cannot stand in a tag, is told to it by its path. That stays until the WebUI lists its LoRAs anew, and no prompt can mean it by chance.
    """
    import networks

    known = _entry(networks, file.stem)
    if _is_file(known, file) and _can_be_written(file.stem):
        return file.stem
    if known is None and _can_be_written(file.stem) and not _has_twin(file):
        return file.stem  # new in the folder: the WebUI looks for it itself
    name = _path_as_name(file)
    while _entry(networks, name) is not None and not _is_file(_entry(networks, name), file):
        name += "_"
    if _entry(networks, name) is None:
        import network

        networks.available_network_aliases[name] = network.NetworkOnDisk(name, str(file))
    return name


def _entry(networks: Any, name: str) -> Any:
    """What the WebUI finds by this name, or None."""
    if name.lower() in networks.forbidden_network_aliases:
        return networks.available_networks.get(name)
    return networks.available_network_aliases.get(name)


def _is_file(entry: Any, file: Path) -> bool:
    try:
        return entry is not None and Path(entry.filename).resolve() == file.resolve()
    except OSError:
        return False


def _can_be_written(name: str) -> bool:
    return not set(name) & set("<>:,\n")


def _has_twin(file: Path) -> bool:
    return sum(1 for folder in folders() for _ in folder.rglob(f"{escape(file.stem)}.*")) > 1


def _path_as_name(file: Path) -> str:
    """The file's path in its folder, without what a tag cannot have."""
    for folder in folders():
        if file.is_relative_to(folder):
            file = file.relative_to(folder)
            break
    path = file.with_suffix("").as_posix()
    return "./" + "".join(sign if _can_be_written(sign) else "_" for sign in path)


def _is_speed_lora(file: Path) -> bool:
    import networks

    entry = _entry(networks, file.stem)
    metadata = getattr(entry, "metadata", None) if _is_file(entry, file) else None
    return looks_like_speed_lora(file.stem, metadata or {})
