"""Where a LoRA lies: a file or folder of this machine, or a repository of the Hub. Source: [ours]."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

from loras import LORA_WEIGHTS
from programs.loading import is_hub_id


_SUFFIX = ".safetensors"
# Of a page of the Hub: repository, revision, and a file or folder in it.
_HUB_PAGE = re.compile(r"([^/]+/[^/]+)(?:/(blob|raw|resolve|tree)/([^/]+)(?:/(.+))?)?")


def clean_source(source: str) -> str:
    """A LoRA's path or id, as of `find_lora`, without what is copied along: quotes, "~", and an address of the Hub.

    Raises ValueError: an address that is of no LoRA on the Hub; one line without `source`.
    """
    text = source.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    if not text.startswith(("http://", "https://")):
        return os.path.expanduser(text)
    parts = urlsplit(text)
    match = _HUB_PAGE.fullmatch(unquote(parts.path).strip("/"))
    hosts = ("huggingface.co", "www.huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc)
    if match is None or parts.netloc not in hosts:
        raise ValueError("not the address of a LoRA on the Hub, such as https://huggingface.co/user/name")
    repository, kind, revision, file = match.groups()
    if revision not in (None, "main"):
        raise ValueError(f"of the revision {revision!r}, and only main is read: download the file and name that")
    if kind not in (None, "tree") and not (file or "").endswith(_SUFFIX):
        raise ValueError(f"not a {_SUFFIX} file")
    if file is not None and not file.endswith(_SUFFIX):
        file = f"{file}/{LORA_WEIGHTS}"
    return repository if file is None else f"{repository}/{file}"


def find_lora(source: str, cache_dir: str | None = None) -> Path:
    """The file that is meant: one of this machine, or else downloaded from the Hub.

    `source` is a `.safetensors` file, a folder with one, or of the Hub "user/name", "user/name/file.safetensors" or
    their address.

    Raises ValueError: there is no such file, or several; one line without `source`.
    """
    path, place = Path(clean_source(source)), find_on_hub(source)
    if path.is_file():
        if path.suffix != _SUFFIX:
            raise ValueError(f"not a {_SUFFIX} file")
        return path
    if path.is_dir():
        names = sorted(file.name for file in path.glob(f"*{_SUFFIX}"))
        if LORA_WEIGHTS in names:
            return path / LORA_WEIGHTS
        if len(names) != 1:
            raise ValueError(f"the folder has no {LORA_WEIGHTS}, and {len(names)} {_SUFFIX} files instead of one")
        return path / names[0]
    if place is None:
        raise ValueError("no such file or folder")
    with _asking_hub(place[1], "no file or folder of this machine, nor found on the Hub"):
        return Path(hf_hub_download(*place, cache_dir=cache_dir))


def find_on_hub(source: str) -> tuple[str, str] | None:
    """The repository and the file in it that are meant; None for what is here, or can only be a path."""
    source = clean_source(source)
    return None if Path(source).exists() else _parse_id(source)


def _parse_id(source: str) -> tuple[str, str] | None:
    owner, _, rest = source.partition("/")
    repository, _, file = rest.partition("/")
    if repository.endswith(_SUFFIX) or (file and not file.endswith(_SUFFIX)):
        return None
    if ".." in file.split("/") or "\\" in file:  # it would lead out of the repository
        return None
    repository = f"{owner}/{repository}"
    return (repository, file or LORA_WEIGHTS) if is_hub_id(repository) else None


def download_public_lora(source: str, folder: str, max_bytes: float) -> Path:
    """A LoRA of a public repository, into a folder, for somebody whom this machine's files and token are not for.

    No file of this machine is looked at, no token is sent, and what lies in the Hub's cache here is not used: it may
    have come with a token.

    Raises ValueError: no such file in a public repository, or a larger one; one line without `source`.
    """
    place = _parse_id(clean_source(source))
    if place is None:
        raise ValueError(f"not a public LoRA of the Hub, as user/name or user/name/file{_SUFFIX}")
    with _asking_hub(place[1], "not found among the public LoRAs of the Hub"):
        found = get_hf_file_metadata(hf_hub_url(*place), token=False)
        if found.size is None or found.size > max_bytes:
            size = "of unknown size" if found.size is None else f"{found.size / 1e6:.1f} MB"
            raise ValueError(f"{size}, and at most {max_bytes / 1e6:g} MB are downloaded")
        # That commit, so that it is the file whose size is known.
        return Path(hf_hub_download(*place, revision=found.commit_hash, token=False, local_dir=folder))


@contextmanager
def _asking_hub(file: str, otherwise: str) -> Iterator[None]:
    try:
        yield
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"no {file} there; name the file, as in user/name/file{_SUFFIX}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{otherwise}: {' '.join(str(error).split())}") from error
