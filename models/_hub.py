"""The Hugging Face Hub, reached only when it is asked for: huggingface_hub is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritoncaps._files import CheckpointError

# What a directory of `save_pretrained` holds.
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# What the directory of a run holds: the best weights, and the last checkpoint.
OF_A_RUN = BEST, LAST = "model_best.safetensors", "last.safetensors"


def download(function: str, repo_id: str, **options: Any) -> Path:
    """Download a model's configuration and weights, and return the directory that holds them.

    A revision may follow the repository: ``owner/name@v1``. What was downloaded before is found
    without a network.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        CheckpointError: the repository or the network is not there.
    """
    repo_id, _, revision = repo_id.partition("@")
    if revision:
        options["revision"] = revision
    with _explained(function, repo_id) as hub:
        return Path(hub.snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS], **options))


def upload(
    function: str,
    repo_id: str,
    directory: Path,
    *,
    private: bool | None,
    token: str | bool | None,
    **options: Any,
) -> str:
    """Upload a directory to a repository, created if it does not exist; returns the commit's URL.

    Raises:
        ModuleNotFoundError, CheckpointError: as for `download`.
    """
    with _explained(function, repo_id) as hub:
        api = hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **options))


@contextmanager
def _explained(function: str, repo_id: str) -> Iterator[Any]:
    """Yield huggingface_hub, and turn its errors into ones that say what to do."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{function}: the Hugging Face Hub is reached by huggingface_hub, which cannot be "
            f'imported ({error}): pip install "tritoncaps[hub]", or use a directory'
        ) from error
    try:
        yield huggingface_hub
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{function}: {repo_id!r} is no repository of the Hub: give owner/name "
            f"({_first_line(error)})"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{function}: {repo_id} is open only to those who accept its terms: accept them on "
            "huggingface.co, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{function}: there is no repository {repo_id} that you may read: check the name, and "
            "for a private one log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{function}: {repo_id} has no such revision: {_first_line(error)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{function}: {repo_id} was not downloaded before, and the Hub cannot be reached: "
            "connect to a network, or copy the repository here and give local-dir:PATH "
            f"({_first_line(error)})"
        ) from error
    except (errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        raise CheckpointError(
            f"{function}: the Hub refused {repo_id}: {_first_line(error)}"
        ) from error
    except (TypeError, ValueError):
        raise
    except Exception as error:  # such as those of the HTTP library, which differs by release
        raise CheckpointError(
            f"{function}: {repo_id} cannot be exchanged with the Hub: check the network, or use a "
            f"directory ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
