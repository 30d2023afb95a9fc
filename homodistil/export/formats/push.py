"""Uploads exported files to a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from homodistil.errors import UserError
from homodistil.models.checkpoint_files import first_line


def check_push(repository: str) -> None:
    """Raise `UserError` where `repository` is no name, or no token is stored. Asks nobody."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"--push: {repository[:100]!r} is no repository ({first_line(error)}); give OWNER/NAME"
        ) from None
    if huggingface_hub.get_token() is None:
        raise UserError("--push: no token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, files: Sequence[str], repository: str) -> str:
    """Upload `files` (relative to `folder`) to `repository`, which is made if it is not there. Returns its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, allow_patterns=list(files), commit_message="Exported by homodistil"
        )
    except Exception as error:  # of the client and its transport
        raise UserError(
            f"--push: cannot upload to {repository} ({first_line(error)}); the files are in {folder}: upload them with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return str(url)
