from pathlib import Path


FOLDER = Path()


def get_filename_list(kind):
    return sorted(path.name for path in FOLDER.glob("*.safetensors")) if kind == "loras" else []


def get_full_path_or_raise(kind, name):
    if not (FOLDER / name).is_file():
        raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
    return str(FOLDER / name)
