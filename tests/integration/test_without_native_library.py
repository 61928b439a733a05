"""The package quantizes and generates without its compiled kernels, and says so once."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig

CODE = """
import sys
# An editable installation puts a finder before sys.path, where the copy is.
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
import squeezellm_hf.ops
print(squeezellm_hf.ops.__file__)
import torch
from transformers import AutoModelForCausalLM
from squeezellm_hf import SqueezeLLMConfig
ids = torch.load(sys.argv[2])
config = SqueezeLLMConfig(bits=3, dataset=ids, n_samples=4, sequence_length=32)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
output = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)
torch.save((model.state_dict(), model(ids).logits.detach(), output), sys.argv[3])
"""


def test_same_result_from_the_reference(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    """A copy of the package without the library, as a machine without a compiler has it."""
    package = Path(__file__).parents[2] / "squeezellm_hf"
    copy = tmp_path / "copy" / "squeezellm_hf"
    for path in package.rglob("*.py"):
        target = copy / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [str(checkpoint), str(tmp_path / "ids.pt"), str(tmp_path / "result.pt")]
    result = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(copy / "ops" / "__init__.py")
    assert result.stderr.count("UserWarning") == 1, result.stderr
    tensors, logits, output = torch.load(tmp_path / "result.pt")

    config = SqueezeLLMConfig(bits=3, dataset=token_ids, n_samples=4, sequence_length=32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    assert all(tensor.equal(tensors[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(token_ids).logits, logits, rtol=1e-4, atol=1e-4)
    generated = model.generate(token_ids[:1, :8], max_new_tokens=8, do_sample=False)
    assert generated.equal(output)
