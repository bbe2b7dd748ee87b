"""Uploading to the Hugging Face Hub, with the token and the endpoint that huggingface_hub finds."""

from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def check_repository(repository: str) -> None:
    """Refuse what can be known to fail before anything is sent.

    Args:
        repository: ``owner/name``, or ``name`` for one of the user's own.

    Raises:
        UserError: If the Hub has no such names, no token is found, or huggingface_hub is to stay offline.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as refusal:
        raise UserError(
            f"push_to_hub is {repository!r}; expected owner/name or name, of letters, digits, '-', '_' and '.'."
        ) from refusal
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set, so nothing is sent; unset it to upload.")
    if not get_token():
        raise UserError("push_to_hub: no token of the Hub was found; log in with 'hf auth login' or set HF_TOKEN.")


def push_folder(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder as one commit; the repository is made if there is none.

    Args:
        folder: What to upload, all of it.
        repository: ``owner/name`` or ``name``.
        private: Make a new repository private; one that exists stays as it is.

    Returns:
        The address of the repository.

    Raises:
        UserError: If the Hub cannot be reached or refuses; no commit was made then, or none was confirmed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from rlhf_lightning import __version__

    # What its HTTP library raises of a network that is down is no OSError in each release.
    http: tuple[Any, ...] = HfHubHTTPError.__bases__
    failures: tuple[type[Exception], ...] = (*http, OSError, ValueError, KeyError, RuntimeError)
    api = HfApi(library_name="rlhf_lightning", library_version=__version__)
    done = "nothing was uploaded"
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        done = f"the repository {url.repo_id} is there, but no commit was confirmed"
        api.create_commit(url.repo_id, _additions(Path(folder)), commit_message="Upload the model and its card")
    except failures as failure:
        raise UserError(
            f"push_to_hub: {_reason(failure, repository)}; {done}. The folder '{folder}' is complete; upload it later "
            f"with: hf upload {repository} '{folder}'"
        ) from failure
    return str(url)


def _additions(folder: Path) -> "list[CommitOperationAdd]":
    """Return all files of a folder for one commit; ``upload_folder`` may make several of them, and stop in between."""
    from huggingface_hub import CommitOperationAdd

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]


def _reason(failure: Exception, repository: str) -> str:
    """Say in a few words what went wrong; what is refused by its status first."""
    from huggingface_hub import constants

    response = getattr(failure, "response", None)
    status = getattr(response, "status_code", None)
    known = {
        401: "the Hub does not accept the token (401); log in with 'hf auth login' or set HF_TOKEN to a valid one",
        403: f"the token may not write to {repository} (403); give it the right to write, or another repository",
        404: f"there is no {repository} that the token may see (404)",
    }
    if status in known:
        return known[status]
    told = getattr(failure, "server_message", None) or str(failure).strip() or type(failure).__name__
    told = shorten(" ".join(str(told).split()), 160, placeholder=" ...").rstrip(".")
    if status is not None:
        return f"the Hub answered {status} ({told})"
    return f"{constants.ENDPOINT} could not be reached or broke off ({told})"
