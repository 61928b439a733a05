"""Generate text with a quantized model whose layers are spread over several processes.

    torchrun --nproc_per_node 2 examples/tensor_parallel.py MODEL "The capital of France is"

MODEL is a Hub id or a folder of a model that is quantized already. Each process takes its part of
every layer, on its own GPU where there are any, else on the CPU.
"""

import os
import sys

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig


def main(name: str, prompt: str) -> None:
    """Print what a model makes of a prompt, and what each process holds."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", distributed_config=DistributedConfig(tp_plan="auto", tp_size=size)
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    held = sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in model.parameters())
    print(f"process {dist.get_rank()} of {size}: {held / 1e6:,.1f} MB", flush=True)
    dist.barrier()
    if dist.get_rank() == 0:
        print(tokenizer.decode(output[0], skip_special_tokens=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 3 or "WORLD_SIZE" not in os.environ:
        sys.exit(__doc__)
    main(*sys.argv[1:])
