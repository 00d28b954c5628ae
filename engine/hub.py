"""Model ids of the Hugging Face Hub, ``owner/name`` or ``owner/name/file``.

Downloads once; where that cannot be done, the error says what to do instead.
``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work as everywhere with ``huggingface_hub``.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from .checkpoint_files import WEIGHT_SUFFIXES
from .errors import InputError
from .model import Controller
from .model_folder import is_model_folder, needed_files, single_weights_file

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>\w[\w./-]*))?", re.ASCII)


def is_hub_id(model: str) -> bool:
    """Whether the name has the form of a hub id. Two parts, the last like a weights file's, are a path."""
    match = _ID.fullmatch(model)
    return match is not None and (match["file"] is not None or not model.endswith(WEIGHT_SUFFIXES))


def fetch(model: str, controller: Controller | None) -> Path:
    """The local file or folder of a hub id, downloaded into the hub's cache unless it is there already.

    Of a repository with several weights files, ``controller`` decides between names with and without
    ``local``. Raises :class:`InputError` if the id does not exist or needs a token, and, without a network,
    if the cache does not hold it.
    """
    # Imported here: it takes a noticeable part of a second, and most models are local.
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound

    match = _ID.fullmatch(model)
    assert match is not None, model
    repo, file = match["repo"], match["file"]
    if not _host_resolves():
        return _cached(model, repo, file, controller, "its name cannot be resolved")
    try:
        if file is None:
            names = HfApi().list_repo_files(repo)
            if is_model_folder(names):
                return Path(snapshot_download(repo, allow_patterns=needed_files(names)))
            file = single_weights_file(names, controller, model)
        return Path(hf_hub_download(repo, file))
    except InputError:
        raise
    except GatedRepoError:
        raise InputError(
            f"{model}: the Hub gives it only to accounts that accepted its terms; accept them at "
            f"https://huggingface.co/{repo} and set HF_TOKEN"
        ) from None
    except NotFound:
        raise InputError(
            f"{model}: no such file or folder here, and no such model on the Hugging Face Hub (or it is "
            "private: then set HF_TOKEN); give a checkpoint's path, a hub id owner/name, or builtin:nano"
        ) from None
    # LocalEntryNotFoundError, its subclass, means that the Hub could not be asked.
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"{model}: the repository {repo} has no file {file}; see https://huggingface.co/{repo}"
            ) from None
        return _cached(model, repo, file, controller, f"{type(error).__name__}: {error}")
    # What a missing network raises depends on the HTTP library, which has changed twice between hub versions.
    except Exception as error:
        return _cached(model, repo, file, controller, f"{type(error).__name__}: {error}")


def _host_resolves() -> bool:
    """False without a network: the client itself would retry for half a minute and print about it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # the client, or the proxy, knows better
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443))
    except OSError:
        return False


def _cached(model: str, repo: str, file: str | None, controller: Controller | None, reason: str) -> Path:
    """The same from the hub's cache alone, when the Hub cannot be asked."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    store = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    reference = store / "refs" / "main"
    if reference.is_file():
        snapshot = store / "snapshots" / reference.read_text().strip()
        if file is not None and (snapshot / file).is_file():
            return snapshot / file
        if file is None and snapshot.is_dir() and any(snapshot.iterdir()):
            return snapshot
    page = f"https://huggingface.co/{repo}" + (f"/blob/main/{file}" if file else "")
    command = f"hf download {repo}" + (f" {file}" if file else "")
    raise InputError(
        f"{model}: not on this machine, and the Hugging Face Hub cannot be reached "
        f"({reason.splitlines()[0]}). With a network, download it from {page} (for example `{command}`), "
        "then give the path of the downloaded file or folder, or put the cache it filled at "
        f"{constants.HF_HUB_CACHE} (set HF_HOME for another place); builtin:nano works offline"
    )
