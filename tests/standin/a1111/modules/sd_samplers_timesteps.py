"""The denoiser of DDIM and its like, whose model wrapper gives noise."""

import torch
from modules.sd_samplers_cfg_denoiser import CFGDenoiser, ModelWrapper


class NoiseWrapper(ModelWrapper):
    def forward(self, x, sigma, cond):
        return self.inner_model.apply_model(x, sigma, cond)


class CFGDenoiserTimesteps(CFGDenoiser):
    wrapper = NoiseWrapper
    alphas = torch.linspace(0.9991, 0.0047, 1000)
