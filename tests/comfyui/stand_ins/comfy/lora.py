"""A LoRA's weights under the names that a model knows."""


def model_lora_keys_unet(model, key_map):
    return key_map | model.lora_names


def load_lora(lora, to_load, log_missing=True):
    assert not log_missing
    known = {key.split(".")[0] for key in lora} & to_load.keys()
    return {to_load[name]: name for name in known}
