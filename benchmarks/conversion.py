"""Time and memory of `squeezellm convert` on a file with random content and a billion weights.

    python benchmarks/conversion.py --bits 4 --json conversion.json

The file has the shapes of TinyLlama-1.1B, fp32 tables and 0.44 % sparse values. Memory is what the
process holds beside mapped files (RssAnon, Linux), looked at every 10 ms, above that before.
"""

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import hardware
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from squeezellm_hf.integration.convert import convert_checkpoint

SPARSE_FRACTION = 0.0045
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    dtype="float16",
)


def random_file(folder: Path, bits: int) -> int:
    """Write a checkpoint with random content; returns the number of its quantized weights."""
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    torch.manual_seed(0)
    state: dict[str, Any] = {}
    weights = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors = random_layer(*module.weight.shape, bits)
            state |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
            weights += module.weight.numel()
    for key, tensor in model.state_dict().items():
        if f"{key.rpartition('.')[0]}.qweight" not in state:
            state[key] = 0.02 * torch.randn(tensor.shape, dtype=torch.float16)
    torch.save(state, folder / "random.pt")
    return weights


def random_layer(out_features: int, in_features: int, bits: int) -> dict[str, Tensor]:
    """Tensors of one layer, as squeezellm_hf.formats.legacy describes them."""
    per_row = int(SPARSE_FRACTION * in_features)
    step = in_features // per_row
    columns = torch.arange(per_row) * step + torch.randint(step, (out_features, per_row))
    words = (in_features // 32 * bits, out_features)
    return {
        "qweight": torch.randint(-(2**31), 2**31, words, dtype=torch.int32),
        "lookup_table": 0.02 * torch.randn(out_features, 2**bits),
        "rows": per_row * torch.arange(out_features + 1, dtype=torch.int32),
        "cols": columns.flatten().int(),
        "vals": 0.2 * torch.randn(out_features * per_row),
    }


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Peak(threading.Thread):
    """Watches the memory of the process until `done` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.n_bytes = 0

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.n_bytes = max(self.n_bytes, anonymous_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, default=4, choices=(3, 4))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        weights = random_file(source, arguments.bits)
        before = anonymous_bytes()
        peak = Peak()
        peak.start()
        start = time.perf_counter()
        conversion = convert_checkpoint(source, out)
        seconds = time.perf_counter() - start
        peak.done.set()
        sizes = [sum(p.stat().st_size for p in f.iterdir()) for f in (source, out)]
    result = {
        "bits": arguments.bits,
        "weights": weights,
        "seconds": seconds,
        "peak_bytes": peak.n_bytes - before,
        "file_bytes": sizes[0],
        "result_bytes": sizes[1],
        "largest_error": max(conversion.errors.values(), default=0.0),
        "hardware": hardware.stamp(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
