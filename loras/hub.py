"""A finished LoRA on the Hub: the repository is made before the training, and filled after it. Source: [ours]."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from loras import CARD, LORA_WEIGHTS


def create_hub_repo(hub_model_id: str, token: str | None, private: bool) -> str:
    """Make the repository before the training, so that a wrong name or token ends the program at once.

    Args:
        hub_model_id: "user/name", or "name" for the token's own user. It may exist.
        token: None takes the one of `hf auth login` or of the environment.
        private: whether a new repository is private. One that exists keeps its state, so a public one is refused.

    Returns: "user/name".
    Raises ValueError: a name that the Hub does not take; no token, an unknown one, or one that may not write; a public
    repository where a private one is wanted; the Hub is out of reach. The message never holds the token.
    """
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id: {error}") from error
    api = HfApi(token=token)
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError("--hub_token: there is none, and `hf auth login` has stored none either") from error
    except HfHubHTTPError as error:
        raise ValueError(f"--hub_token: the Hub does not take it: {_one_line(error, token)}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"--hub_token: cannot ask {api.endpoint} about it: {_one_line(error, token)}") from error
    # `create_repo` is content with a repository that the token can only read, if it exists.
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("--hub_token: it may only read; pushing needs a token that may write")
    repo_id = hub_model_id if "/" in hub_model_id else f"{account['name']}/{hub_model_id}"
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_public = not api.model_info(repo_id).private
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"--hub_model_id: cannot make {repo_id!r}: {_one_line(error, token)}") from error
    if private and is_public:
        raise ValueError(f"--hub_model_id: {repo_id!r} exists and is public, and a private repository is wanted")
    return repo_id


def push_lora(
    folder: Path, repo_id: str, token: str | None, code: Mapping[str, Path], files: Sequence[str],
) -> str:  # fmt: skip
    """Upload the model card, the LoRA and what else is listed, and nothing else, in one commit; returns the address.

    Args:
        code: Python files by their name in the repository; `pipeline.py` is the one that diffusers looks for.
        files: further files as paths relative to the output folder: the LoRA in kohya's format, and pictures.

    Raises:
        ValueError: a file holds the token, or is a link out of the folder.
        OSError: a file is missing; the Hub refused or did not answer, and the message says how to push again.
    """
    own = {name: folder / name for name in dict.fromkeys((CARD, LORA_WEIGHTS, *files))}
    secret, additions = token or get_token(), []
    for name, path in {**own, **code}.items():
        if name in own and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}, and is not pushed")
        content = path.read_bytes()
        if secret and secret.encode() in content:
            raise ValueError(f"{path} holds the Hub's token, and is not pushed")
        additions.append(CommitOperationAdd(name, content))
    try:
        message = "Upload LoRA, pipeline and model card"
        commit = HfApi(token=token).create_commit(repo_id, additions, commit_message=message)
    # The transport of large files raises RuntimeError, and metadata that the Hub does not take a ValueError.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        includes = [word for name in own for word in ("--include", name)]
        commands = [["hf", "upload", repo_id, str(folder), ".", *includes]]
        commands += [["hf", "upload", repo_id, str(path), name] for name, path in code.items()]
        again = " && ".join(shlex.join(command) for command in commands)
        raise OSError(
            f"--push_to_hub: {repo_id} was not pushed ({_one_line(error, secret)}); nothing is lost, the LoRA is "
            f"whole in {folder}; push it again with: {again}"
        ) from error
    return str(commit.repo_url)


def _one_line(error: Exception, token: str | None) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line.replace(token, "***") if token else line
