"""Save so that a crash never costs the previous output, and with a model card.

Transformers writes straight into the target directory. A quantized model carries its own
``save_pretrained``, which writes into a directory beside the target first and moves the files
when all are complete.
"""

import os
import shutil
import tempfile
import types
from pathlib import Path
from typing import Any

from squeezellm_hf.integration.card import MARKER, model_card
from squeezellm_hf.integration.push import CARD, push_to_hub

# What save_pretrained(push_to_hub=True, ...) takes for the push.
_HUB_ARGUMENTS = (
    *("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr"),
    "tags",
)


def attach(model: Any) -> None:
    """Give ``model`` two methods in place of its class's."""
    model.save_pretrained = types.MethodType(save_pretrained, model)
    model.push_to_hub = types.MethodType(push_to_hub, model)


def detach(model: Any) -> None:
    """Undo :func:`attach`."""
    for name in ("save_pretrained", "push_to_hub"):
        model.__dict__.pop(name, None)


def refuse(model: Any, reason: str) -> None:
    """Have both methods raise ValueError: what they would write is not the model."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{reason}: load it in one process, without tp_plan, to save it")

    model.save_pretrained = model.push_to_hub = refused


def save_pretrained(
    self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """``PreTrainedModel.save_pretrained``, to a temporary directory and then renamed.

    On an error (a full disk, a kill) ``save_directory`` holds what it held before. A README.md
    that somebody wrote is left alone. Of a model with adapters (``add_adapter``) transformers saves
    the active adapter alone.
    """
    if getattr(self, "_hf_peft_config_loaded", False):
        # Transformers saves the adapter alone then: no card of ours, and no weights to replace.
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
        return
    target = Path(save_directory)
    push = kwargs.pop("push_to_hub", False)
    hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
    if target.exists() and not target.is_dir():
        raise ValueError(f"save_directory={str(target)!r} is a file; a directory is needed")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        type(self).save_pretrained(self, staging, *args, **kwargs)
        if _may_write_card(target / CARD):
            model_card(self, target.name).save(staging / CARD)
        _replace_files(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if push:
        if "max_shard_size" in kwargs:
            hub["max_shard_size"] = kwargs["max_shard_size"]
        repository = hub.pop("repo_id", target.name)
        self.push_to_hub(repository, token=kwargs.get("token"), **hub)


def _may_write_card(path: Path) -> bool:
    return not path.exists() or MARKER in path.read_text(encoding="utf-8", errors="replace")


def _replace_files(staging: Path, target: Path) -> None:
    """Move all files of ``staging`` into ``target``; the weights of an older save go last."""
    target.mkdir(exist_ok=True)
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = {path.name for path in target.glob("model*.safetensors*")}
    new = sorted(path for path in staging.iterdir())
    for path in sorted(new, key=lambda path: path.name == "config.json"):
        destination = target / path.name
        if path.is_dir():
            shutil.copytree(path, destination, dirs_exist_ok=True)
        else:
            os.replace(path, destination)
    for name in old - {path.name for path in new}:
        (target / name).unlink()
