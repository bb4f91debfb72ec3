"""To the hub: an exported folder as a repository of models."""

from __future__ import annotations

from pathlib import Path

from temper.errors import ModelError


def push(folder: Path, repo: str, *, private: bool = True, message: str = "") -> str:
    """Upload a folder that `export` wrote; the address of what was made.

    Args:
        repo: ORG/NAME; made if it is not there.
        private: whether a repository that is made can be seen by its owner alone.

    Raises:
        ModelError: no such folder, one without a model card, no token, no connection.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    if not (folder / "README.md").is_file():
        raise ModelError(f"{folder} has no model card", do="write it by: temper export MODEL DIR")
    if repo.count("/") != 1:
        raise ModelError(f"«{repo}» is no repository", do="name it ORG/NAME")
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message or f"Add {folder.name}")
    except Exception as error:  # no network, no right to write: whatever the HTTP library raises
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        code = getattr(getattr(error, "response", None), "status_code", None)
        raise ModelError(
            f"{repo} could not be written to the hub",
            where=said,
            do="set HF_TOKEN to a token that may write there (or run `hf auth login`)"
            if code in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)
            else "is the hub reachable? what was written stays in the folder",
        ) from None
    return str(made.repo_url if hasattr(made, "repo_url") else made)
