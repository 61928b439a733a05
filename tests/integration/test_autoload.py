"""A quantized repository loads in a process that never imports squeezellm_hf."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from tests.conftest import VOCABULARY, tiny_llama


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, away from the source tree."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        env={**os.environ, "PYTHONPATH": "", **environment},
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, token_ids: Tensor) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("autoload") / "model"
    settings = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32)
    quantize_model(tiny_llama(), None, settings, progress=False).save_pretrained(path)
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path)
    return path


PIPELINE = """
import sys
from transformers import pipeline
generate = pipeline("text-generation", model=sys.argv[1])
print(type(generate.model.model.layers[0].mlp.up_proj).__name__)
print(generate("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"])
"""


def test_pipeline_in_a_fresh_process(repository: Path) -> None:
    result = python(PIPELINE, repository)
    assert result.returncode == 0, result.stderr
    layer, text = result.stdout.splitlines()
    assert layer == "SqueezeLLMLinear"
    assert text.startswith("w1 w2 w3")


def test_it_can_be_switched_off(repository: Path) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    registered = (
        "from transformers.quantizers import auto;"
        "print('squeezellm' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    assert python(registered, **off).stdout == "False\n"
    assert python(f"import squeezellm_hf; {registered}", **off).stdout == "True\n"
    assert python(f"{registered}; import squeezellm_hf; {registered}", **off).stdout == (
        "False\nTrue\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import torch, transformers.quantizers.auto as auto",
        "import squeezellm_hf; import transformers.quantizers.auto as auto",
        "from squeezellm_hf import SqueezeLLMConfig; import transformers.quantizers.auto as auto",
        "from squeezellm_hf import quantize_model; import transformers.quantizers.auto as auto",
        "from transformers import AutoModel; from squeezellm_hf import SqueezeLLMConfig\n"
        "import transformers.quantizers.auto as auto",
        "import squeezellm_hf.integration.quantizer, transformers.quantizers.auto as auto",
        "import torch, transformers.quantizers.auto as auto; import squeezellm_hf",
        "import transformers.quantizers.auto as auto, transformers.modeling_utils",
    ],
)
@pytest.mark.parametrize("autoload", ["0", "1"])
def test_any_order_of_imports(code: str, autoload: str) -> None:
    if autoload == "0" and "squeezellm_hf" not in code:
        pytest.skip("nothing imports squeezellm_hf then")
    check = """
assert auto.AUTO_QUANTIZER_MAPPING["squeezellm"].__name__ == "SqueezeLLMHfQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["squeezellm"] in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
"""
    result = python(f"{code}\n{check}", TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    assert result.returncode == 0, result.stderr
    assert "could not register" not in result.stderr


def test_importing_torch_imports_nothing_of_ours_but_the_hook() -> None:
    result = python(
        "import sys, torch; print(sorted(m for m in sys.modules if m.startswith('squeezellm')));"
        "print('transformers' in sys.modules)"
    )
    names, transformers = result.stdout.splitlines()
    assert names == str(
        ["squeezellm_hf", "squeezellm_hf.integration", "squeezellm_hf.integration.autoload"]
    )
    assert transformers == "False"


BROKEN = """
import sys
class Break:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise {error}
sys.meta_path.insert(0, Break())
import torch, transformers.quantizers.auto
print("torch lives", torch.ones(1).item())
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("squeezellm_hf.integration.register", "ImportError('broken')"),
        ("squeezellm_hf.nn", "RuntimeError('broken')"),
        ("squeezellm_hf.ops", "OSError('no library')"),
    ],
)
@pytest.mark.parametrize("warnings", ["default", "error"])
def test_a_broken_installation_breaks_nobody(name: str, error: str, warnings: str) -> None:
    code = BROKEN.format(name=name, error=error)
    result = python(code, PYTHONWARNINGS=f"{warnings}::RuntimeWarning")
    assert result.stdout == "torch lives 1.0\n", result.stderr
    if warnings == "default":
        assert "SqueezeLLM checkpoints will not load" in result.stderr
