from safetensors.torch import load_file


def load_torch_file(path, safe_load=False):
    assert safe_load
    return load_file(path)
