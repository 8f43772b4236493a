"""The guider and a step of it: rows with one group of hooks are predicted together, the weights patched in between."""

import torch


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher, self.cfg, self.original_conds = model_patcher, 1.0, {}

    def inner_set_conds(self, conds):
        for name, rows in conds.items():
            self.original_conds[name] = [values | {"cross_attn": embeds} for embeds, values in rows]

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(self, noise, latent_image, sampler, sigmas, seed=None):
        self.conds, self.inner_model = self.original_conds, self.model_patcher.model
        self.inner_model.current_patcher = self.model_patcher
        x = noise
        for sigma in sigmas:
            x = sampler(x, self.predict_noise(x, sigma, dict(self.model_patcher.model_options), seed))
        return x

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        positive, negative = self.conds["positive"], self.conds["negative"]
        return sampling_function(self.inner_model, x, timestep, negative, positive, self.cfg, model_options, seed)


def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed):
    conds = [cond, None if cond_scale == 1 else uncond]
    function = model_options.get("sampler_calc_cond_batch_function")
    if function is None:
        positive, negative = calc_cond_batch(model, conds, x, timestep, model_options)
    else:
        step = {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": model_options}
        positive, negative = function(step)
    return negative + (positive - negative) * cond_scale


def calc_cond_batch(model, conds, x_in, timestep, model_options):
    found, groups = [torch.zeros_like(x_in) for _ in conds], {}
    for number, cond in enumerate(conds):
        for row in cond or []:
            groups.setdefault(row.get("hooks"), []).append((number, row))
    for hooks, rows in groups.items():
        model.current_patcher.apply_hooks(hooks)
        for number, row in rows:
            found[number] = model.predict(x_in, timestep, row["cross_attn"], hooks)
    return found
