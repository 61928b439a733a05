"""Push a quantized model to the Hub in one commit, with its model card."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from squeezellm_hf.integration.card import MARKER, add_tags, model_card

CARD = "README.md"
# In the card that transformers puts into a repository without one, with a tokenizer for example.
_FILLED_IN = "This model card has been automatically generated"


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
) -> Any:
    """``PreTrainedModel.push_to_hub``, with our model card unless somebody has written one.

    Weights of an earlier push that the new one does not have are removed in the same commit: beside
    shards, a stale ``model.safetensors`` would be the one that is loaded.

    Returns:
        the ``CommitInfo`` of the upload.
    """
    wanted = [tags] if isinstance(tags, str) else list(tags or ())
    if getattr(self, "_hf_peft_config_loaded", False):
        # Transformers pushes the adapter alone then.
        return type(self).push_to_hub(
            self, repo_id, commit_message=commit_message, commit_description=commit_description,
            private=private, token=token, revision=revision, create_pr=create_pr,
            max_shard_size=max_shard_size, tags=wanted or None,
        )  # fmt: skip
    api = HfApi(token=token)
    repository: str = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / repository.rpartition("/")[2]
        self.save_pretrained(folder, max_shard_size=max_shard_size)
        card = _written_card(api, repository, revision) or model_card(self, repository)
        add_tags(card, wanted)
        card.save(folder / CARD)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            commit_description=commit_description,
            delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
        )


def _written_card(api: HfApi, repository: str, revision: str | None) -> ModelCard | None:
    """The card of the repository, if a person wrote it."""
    if not api.file_exists(repository, CARD, revision=revision):
        return None
    path = api.hf_hub_download(repository, CARD, revision=revision)
    text = Path(path).read_text(encoding="utf-8")
    return None if MARKER in text or _FILLED_IN in text else ModelCard(text)
