"""Run by torchrun for test_tensor_parallel.py: load each checkpoint in parts, write what comes out.

Arguments: a directory with one checkpoint in each directory of it and ``token_ids.pt``, and the
directory of one that is not quantized.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear


def load(path: Path, plan: object = "auto", **kwargs: object):
    """The checkpoint in as many parts as there are processes."""
    parallel = DistributedConfig(tp_plan=plan, tp_size=int(os.environ["WORLD_SIZE"]))
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=parallel, **kwargs)


def message(call, *args: object, **kwargs: object) -> str:
    """What the ValueError says that a call raises."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def adapter_message(model) -> str | None:
    """What is said to a request for an adapter; None where there is no PEFT."""
    if importlib.util.find_spec("peft") is None:
        return None
    peft = importlib.import_module("peft")
    return message(peft.get_peft_model, model, peft.LoraConfig(target_modules="all-linear"))


def results(path: Path, token_ids: torch.Tensor) -> dict[str, object]:
    """What a model loaded in parts does."""
    model = load(path)
    token_ids = token_ids.to(model.device)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}
    with torch.no_grad():
        logits = model(token_ids).logits
    generate = {"max_new_tokens": 8, "do_sample": False}
    prompt = token_ids[:1, :8]
    texts = [
        model.generate(prompt, **generate),
        model.generate(prompt, **generate, cache_implementation="static", disable_compile=True),
    ]
    block = model.model.layers[0]
    states = torch.randn(1, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    states = states.to(model.device)
    compiled = torch.compile(block.mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same = compiled(states).equal(block.mlp(states))
    embeddings = model.get_input_embeddings()(token_ids).detach().requires_grad_()
    output = model(inputs_embeds=embeddings)
    output.logits.square().mean().backward()
    return {
        "logits": logits.cpu(),
        "texts": [text.cpu() for text in texts],
        "compiled": same,
        "gradient": embeddings.grad.cpu(),
        "sizes": {n: (m.out_features, m.in_features, m.nnz) for n, m in layers.items()},
        "bytes": {n: m.weight_bytes for n, m in layers.items()},
        "biases": {n: m.bias is not None for n, m in layers.items()},
        "save": message(model.save_pretrained, path / "again"),
        "dequantize": message(model.dequantize),
        "adapter": adapter_message(model),
        "plan": sorted(set(model._tp_plan.values())),
    }


def refusals(quantized: Path, plain: Path) -> dict[str, str]:
    """What is said to requests that cannot be met."""
    return {
        "plan": message(load, quantized, plan={"model.layers.*.self_attn.q_proj": "colwise"}),
        "quantize": message(load, plain, quantization_config=SqueezeLLMConfig(dataset=None)),
        "damaged": message(load, quantized.parent / "damaged.d"),
        "dequantize": message(
            load, quantized, quantization_config=SqueezeLLMConfig(dequantize=True)
        ),
    }


def main() -> None:
    """Write ``rank<r>.pt`` beside the checkpoints."""
    warnings.simplefilter("ignore")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    directory = Path(sys.argv[1])
    token_ids = torch.load(directory / "token_ids.pt")
    found = {
        path.name: results(path, token_ids)
        for path in sorted(directory.iterdir())
        if path.is_dir() and not path.suffix
    }
    found["refusals"] = refusals(directory / "Qwen2", Path(sys.argv[2]))
    torch.save(found, directory / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
