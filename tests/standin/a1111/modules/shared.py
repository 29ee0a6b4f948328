"""Settings, state and the current model."""

from types import SimpleNamespace

DEFAULTS = {
    "batch_cond_uncond": True,
    "pad_cond_uncond": False,
    "pad_cond_uncond_v0": False,
    "skip_early_cond": 0.0,
    "s_min_uncond_all": False,
    "use_old_scheduling": False,
}
opts = SimpleNamespace(**DEFAULTS, grid_save=True, data={})
cmd_opts = SimpleNamespace(lora_dir=None)
state = SimpleNamespace(interrupted=False, sampling_step=0, sampling_steps=0)
sd_model = None
