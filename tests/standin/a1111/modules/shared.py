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


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, section=None):
        self.default, self.label, self.section = default, label, section

    def info(self, text):
        return self

    def needs_reload_ui(self):
        return self


class Options(SimpleNamespace):
    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)


opts = Options(**DEFAULTS, grid_save=True, data={}, data_labels={})
cmd_opts = SimpleNamespace(lora_dir=None)
state = SimpleNamespace(interrupted=False, sampling_step=0, sampling_steps=0)
sd_model = None
