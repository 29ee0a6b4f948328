"""The callbacks that are used; exceptions in them are printed and forgotten."""

import traceback

callback_map = {"callbacks_cfg_denoiser": []}


class CFGDenoiserParams:
    def __init__(self, x, image_cond, sigma, text_cond, text_uncond, denoiser):
        self.x, self.image_cond, self.sigma = x, image_cond, sigma
        self.text_cond, self.text_uncond, self.denoiser = text_cond, text_uncond, denoiser


def on_cfg_denoiser(callback):
    callback_map["callbacks_cfg_denoiser"].append(callback)


def remove_callbacks_for_function(callback):
    callback_map["callbacks_cfg_denoiser"][:] = [
        each for each in callback_map["callbacks_cfg_denoiser"] if each != callback
    ]


def cfg_denoiser_callback(params):
    for callback in callback_map["callbacks_cfg_denoiser"]:
        try:
            callback(params)
        except Exception:
            traceback.print_exc()


def on_app_started(callback):
    pass
