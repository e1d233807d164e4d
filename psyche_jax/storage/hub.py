"""Models from and to the Hugging Face hub, and rows of its data sets. Data travel, code never does."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from psyche_jax.errors import UserError, first_reason

PREFIX = "hub:"
# Of files in Xet stores. By default a store that refuses or is silent is asked for minutes, without a word.
_XET_PATIENCE = {
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "15s",
    "HF_XET_CLIENT_READ_TIMEOUT": "30s",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "60s",
}


def download(source: str, patterns: Sequence[str]) -> Path:
    """The local folder of `hub:NAME` or `hub:NAME@REVISION`, downloaded unless it is in the hub's cache already.

    Args:
      source: the model.
      patterns: which of its files.

    Raises:
      UserError: there is no such model or revision, no network, or no permission.
    """
    from huggingface_hub import snapshot_download

    name, revision = _name_and_revision(source)
    with _one_line(name, revision):
        token = _token() or False  # False: none at all
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns), token=token))


def repository(source: str) -> str | None:
    """NAME of `hub:NAME` or `hub:NAME@REVISION`; None of what is not on the hub."""
    return _name_and_revision(source)[0] if source.startswith(PREFIX) else None


def license_and_language(folder: Path) -> dict[str, Any]:
    """What the head of a model's card says of them, by the hub's keys; empty where there is no card or no head."""
    from huggingface_hub import metadata_load

    try:
        head = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: head[key] for key in ("license", "license_name", "license_link", "language") if head.get(key)}


def stream_rows(source: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of the data set `hub:NAME` or `hub:NAME@REVISION`, streamed; nothing is kept on the disk.

    Raises:
      UserError: there is no such data set, revision, subset or split, no network, no permission, or its files are
        broken or of no format that holds rows.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError
    from pyarrow.dataset import ParquetFragmentScanOptions

    name, revision = _name_and_revision(source)
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they log what they then raise, and what does not matter
    place = f"hf://datasets/{name}"  # never a local folder of that name
    options: dict[str, Any] = {"revision": revision or None, "token": _token() or False}
    with _one_line(name, revision):
        try:
            builder = load_dataset_builder(place, subset, **options)
            if hasattr(builder.config, "fragment_scan_options"):  # of Parquet files
                builder.config.fragment_scan_options = ParquetFragmentScanOptions(page_checksum_verification=True)
            yield from builder.as_streaming_dataset(split)
        except (ValueError, RuntimeError, DatasetsError) as error:
            # What it says of repositories, revisions, subsets, splits, scripts; or of bytes that are no rows.
            raise UserError(f"{source}: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def create(name: str) -> None:
    """Make sure that there is a repository to push to; a new one is private.

    Raises:
      UserError: there is no token, no network, or no permission.
    """
    from huggingface_hub import create_repo

    if not _token():
        raise UserError(f"{PREFIX}{name}: set HF_TOKEN to a token that may write there ({_site()}/settings/tokens)")
    with _one_line(name):
        create_repo(name, private=True, exist_ok=True, token=_token())


def upload(folder: Path, name: str) -> None:
    """Put the files of `folder` into the repository, in one commit.

    Raises:
      UserError: the hub does not take them; `folder` stays as it is.
    """
    from huggingface_hub import upload_folder

    try:
        with _one_line(name):
            upload_folder(repo_id=name, folder_path=folder, commit_message="psyche export", token=_token())
    except UserError as error:
        raise UserError(f"{error}; {folder} is written: upload it with `hf upload {name} {folder}`") from None


def _name_and_revision(source: str) -> tuple[str, str]:
    """Of `hub:NAME` or `hub:NAME@REVISION`; the revision may be empty."""
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    if not name:
        raise UserError(f"{source}: names no repository; write {PREFIX}OWNER/NAME")
    return name, revision


def _token() -> str:
    """Only from the environment: what others stored on this machine is not ours to use."""
    return os.environ.get("HF_TOKEN", "")


@contextmanager
def _one_line(name: str, revision: str = "") -> Iterator[None]:
    """Raises what the hub, the network or a wrong name brings about as a UserError."""
    from huggingface_hub import errors

    for name_of_setting, value in _XET_PATIENCE.items():
        os.environ.setdefault(name_of_setting, value)
    try:
        yield
    except (RuntimeError, errors.XetDownloadError) as error:  # what hf_xet raises
        raise UserError(f"{PREFIX}{name}: {_WITHOUT_XET.format(first_reason(error))}") from None
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.HfHubHTTPError) and "/xet-" in str(cause.response.url):  # of the tokens for a store
            why = _WITHOUT_XET.format(f"{_site()} gives no token for it, status {status}")
        elif isinstance(cause, errors.GatedRepoError):
            why = f"is gated: accept its terms on {_site()} and set HF_TOKEN"
        elif isinstance(cause, errors.RevisionNotFoundError):
            why = f"has no revision {revision!r}"
        elif isinstance(cause, errors.RepositoryNotFoundError):
            why = "there is no such repository, or it is private and HF_TOKEN does not open it"
        elif status in (401, 403):
            why = "HF_TOKEN is not set, or gives no permission for it"
        elif isinstance(cause, errors.HFValidationError):
            why = f"is not the name of a repository ({first_reason(cause)})"
        elif status is None and isinstance(cause, errors.HTTPError | ConnectionError):  # also: HF_HUB_OFFLINE
            how = "set HF_ENDPOINT to a mirror, or copy the repository's files here and give their path"
            why = f"{_site()} cannot be reached ({type(cause).__name__}); {how}"
        else:
            why = first_reason(error)
        raise UserError(f"{PREFIX}{name}: {why}") from None


_WITHOUT_XET = "its files cannot be fetched from their Xet store ({}); set HF_HUB_DISABLE_XET=1 to do without it"


def _site() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
