"""An exported student on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check(repository: str) -> None:
    """Raise ValueError if the hub would not take a student under this name from here, as far as it shows."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(
            f"run.push_to_hub is {repository[:100]!r}, which is no name of a repository: {str(error)[:300]}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"run.push_to_hub is {repository!r}, and HF_HUB_OFFLINE is set; unset it, or leave the setting "
            "out"
        )
    if get_token() is None:
        raise ValueError(
            f"run.push_to_hub is {repository!r}, and there is no token to write with; set HF_TOKEN, or run "
            "`hf auth login`"
        )


def push(folder: Path, repository: str) -> str:
    """Send an exported student's folder to its repository, which is made, private, if it is not there.

    Returns its address. Raises what the hub's library raises.
    """
    hub = HfApi(library_name="ibdistill")
    name = hub.create_repo(repository, private=True, exist_ok=True).repo_id
    hub.upload_folder(repo_id=name, folder_path=folder, commit_message="A student distilled with ibdistill")
    return f"{hub.endpoint}/{name}"
