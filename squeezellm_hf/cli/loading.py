"""Flags that tell how models are loaded, and the loading itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class Loading:
    """How models are loaded."""

    device_map: str | None = None
    """Where to: "cpu", "cuda", "cuda:1", or "auto" to spread a model over what is there."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights that are not quantized, and of activations; "auto": the checkpoint's.
    On a CPU bfloat16 is several times faster where it has instructions for it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    token: str | None = None
    """Hub access token; by default that of `hf auth login` or of HF_TOKEN."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories whose code you have read."""

    @property
    def _hub(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    def config(self, name: str) -> Any:
        """Load a model's config.

        Raises:
            OSError: There is no such folder or repository, or the Hub cannot be reached.
        """
        from transformers import AutoConfig

        check_name(name)
        return AutoConfig.from_pretrained(name, **self._hub)

    def model(self, name: str, *, any_kind: bool = False, **options: Any) -> Any:
        """Load a model, in evaluation mode.

        Args:
            name: Hub id or folder.
            any_kind: As the class of Transformers that its config names, if that is no causal
                language model; otherwise, and by default, as one.
            options: Of `from_pretrained`.
        """
        import transformers

        from squeezellm_hf.integration.classes import class_names

        check_name(name)
        kind = transformers.AutoModelForCausalLM
        if any_kind:
            named = (getattr(self.config(name), "architectures", None) or [""])[0]
            if named and named not in class_names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
                kind = getattr(transformers, named, kind)
        model = kind.from_pretrained(
            name, dtype=self.dtype, device_map=self.device_map, **self._hub, **options
        )
        return model.eval()

    def tokenizer(self, name: str) -> Any:
        """Load the tokenizer that lies with a model."""
        from transformers import AutoTokenizer

        check_name(name)
        return AutoTokenizer.from_pretrained(name, **self._hub)


def check_name(name: str) -> None:
    """Tell a mistyped path from a Hub id.

    Raises:
        FileNotFoundError: `name` can only be a path, and there is no such folder.
    """
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name!r}")


def files_size(name: str) -> int | None:
    """Return the bytes of a local checkpoint's safetensors files; None for a Hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
