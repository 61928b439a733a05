"""Time and memory of a step of distillation at the shapes of a model, with random weights.

    python benchmarks/distill_step.py smollm2-135m --device cuda
    python benchmarks/distill_step.py llama-3-8b --device cuda --bits 4 --micro-batch 2 --profile

No checkpoint is needed. The time is that of whole updates: forward, backward, Adam.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from hardware import stamp
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from squeezellm_hf.distillation.causal_lm import CausalLM
from squeezellm_hf.distillation.checkpoint import Checkpoint
from squeezellm_hf.distillation.data import Sequences
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.distillation.student import Student, training
from squeezellm_hf.distillation.trainer import Trainer
from squeezellm_hf.formats import csr, packing
from squeezellm_hf.nn import SqueezeLLMLinear

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


class RandomStates:
    """Stands for the original's hidden states, without its pass over the text."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.states = torch.randn(shape).to(dtype)

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        return self.states[rows]


def random_layer(linear: nn.Linear, bits: int, sparse: float, device: str) -> SqueezeLLMLinear:
    """A quantized layer of the shape of ``linear``, the same number of sparse cells in each row."""
    rows, columns = linear.out_features, linear.in_features
    indices = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    table = 0.02 * torch.randn(rows, 2**bits, device=device)
    tensors = {
        "qweight": packing.pack(indices, bits),
        "lookup_table": table.sort(dim=1).values.half(),
    }
    per_row = round(sparse * columns)
    if per_row:
        step = columns // per_row
        chosen = torch.arange(per_row, device=device) * step
        chosen = chosen + torch.randint(0, step, (rows, per_row), device=device)
        tensors["crow_indices"] = per_row * torch.arange(rows + 1, dtype=torch.int32, device=device)
        tensors["col_indices"] = csr.encode_columns(chosen.flatten(), columns)
        tensors["values"] = (0.1 * torch.randn(rows * per_row, device=device)).half()
    return SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=columns)


def random_model(shape: str, bits: int, sparse: float, device: str) -> Any:
    """A quantized Llama in bf16."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(torch.bfloat16)
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    }
    for name, linear in linears.items():
        model.set_submodule(name, random_layer(linear, bits, sparse, device))
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, key = name.rpartition(".")
            filled = torch.empty_like(parameter, device=device)
            nn.init.ones_(filled) if filled.dim() == 1 else nn.init.normal_(filled, std=0.02)
            setattr(model.get_submodule(module), key, nn.Parameter(filled))
    model.tie_weights()
    return model.eval()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--sparse", type=float, default=0.0045)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--indices", action="store_true", help="train the indices, too")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--profile", action="store_true", help="which kernels take the time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = DistillationSettings(
        steps=1000,
        batch_size=options.batch,
        micro_batch_size=options.micro_batch,
        sequence_length=options.length,
        train_indices=options.indices,
    )
    torch.manual_seed(0)
    model = random_model(options.shape, options.bits, options.sparse, options.device)
    ids = torch.randint(0, model.config.vocab_size, (2 * options.batch, options.length))
    accelerator = options.device != "cpu"

    def wait() -> None:
        if accelerator:
            torch.accelerator.synchronize()

    student = Student(model, settings)
    with training(model, student):
        lm = CausalLM(model, mixed_precision=True)
        states = RandomStates((*ids.shape, model.config.hidden_size), torch.bfloat16)
        trainer = Trainer(
            lm,
            student,
            Sequences(ids, ids[:1]),
            states,
            settings,
            Checkpoint(None),  # type: ignore[arg-type]
        )
        if not options.eager:
            trainer._graphs = trainer._capture()
        for _ in range(2):
            trainer._step()
        wait()
        start = time.perf_counter()
        for _ in range(options.steps):
            trainer._step()
        wait()
        seconds = (time.perf_counter() - start) / options.steps
        if options.profile:
            with torch.profiler.profile() as profile:
                trainer._step()
                wait()
            key = "self_cuda_time_total" if accelerator else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=90))
    tokens = options.batch * options.length
    row = {
        "shape": options.shape,
        "bits": options.bits,
        "batch": options.batch,
        "micro_batch": settings.micro_batch,
        "length": options.length,
        "indices": options.indices,
        "graphs": len(trainer._graphs),
        "step_ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gb": torch.accelerator.max_memory_allocated() / 1e9 if accelerator else None,
    }
    print(json.dumps(row))
    if options.json is not None:
        options.json.write_text(json.dumps({"result": row, "hardware": stamp()}, indent=1))


if __name__ == "__main__":
    main()
