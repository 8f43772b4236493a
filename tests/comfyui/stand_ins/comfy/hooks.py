"""Hooks of conditionings: groups are told apart by identity, as ComfyUI does."""


class HookGroup:
    def __init__(self, hooks):
        self.hooks = hooks


def create_hook_lora(lora, strength_model, strength_clip):
    assert strength_clip == 0
    return HookGroup([(lora, strength_model)])


def set_hooks_for_conditioning(cond, hooks, append_hooks=True, cache=None):
    rows = []
    for embeds, values in cond:
        own = values.get("hooks")
        if own is None:
            group = hooks
        elif (own, hooks) in cache:
            group = cache[own, hooks]
        else:
            group = cache[own, hooks] = HookGroup(own.hooks + hooks.hooks)
        rows.append([embeds, values | {"hooks": group}])
    return rows
