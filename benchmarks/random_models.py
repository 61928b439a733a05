"""Models of known shapes with random weights; a quantized one has never been a plain one."""

import torch
from accelerate import init_empty_weights
from kernels_cuda import quantized_weight
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from squeezellm_hf.nn import SqueezeLLMLinear, grouping

LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}


def config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """Shapes of Llama-3-8B, Qwen2.5-32B or Llama-3-70B ("8b", "32b", "70b"), or a tiny model.

    Args:
        name: one of "tiny", "8b", "32b", "70b".
        layers: number of blocks; None for the model's own.

    Raises:
        ValueError: if the name is another one.
    """
    if name == "tiny":
        made: PreTrainedConfig = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
    elif name == "8b":
        made = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, **LLAMA_3,
        )  # fmt: skip
    elif name == "70b":
        made = LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, **LLAMA_3,
        )  # fmt: skip
    elif name == "32b":
        made = Qwen2Config(
            vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
            num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            tie_word_embeddings=False,
        )  # fmt: skip
    else:
        raise ValueError(f"model must be tiny, 8b, 32b or 70b, got {name!r}")
    if layers is not None:
        made.num_hidden_layers = layers
        if getattr(made, "layer_types", None):
            made.layer_types = made.layer_types[:layers]
    return made


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks: all but the output head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }


def skeleton(made: PreTrainedConfig) -> nn.Module:
    """The model in bf16, its parameters without memory."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    return model.eval()


def materialize(model: nn.Module, device: str) -> None:
    """Give parameters that have no memory yet random values on the device; move the rest there."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if tensor.dim() > 1:
                tensor.normal_(std=0.02)
            else:  # scales of norms, and biases
                tensor.fill_(0.0 if name == "bias" else 1.0)
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.to(device)


def plain_model(made: PreTrainedConfig, device: str) -> nn.Module:
    """The model in bf16."""
    model = skeleton(made)
    materialize(model, device)
    return model


def quantized_model(made: PreTrainedConfig, bits: int, sparse: bool, device: str) -> nn.Module:
    """The model with all linear layers of its blocks quantized, one after the other.

    Args:
        made: the model's configuration.
        bits: width of the indices, which are random.
        sparse: whether each layer has 0.45 % of sparse values, at random places.
        device: where.
    """
    model = skeleton(made)
    for name, linear in block_linears(model).items():
        tensors = quantized_weight(
            linear.out_features, linear.in_features, bits, sparse, device=device
        )
        if linear.bias is not None:
            tensors["bias"] = torch.zeros(linear.out_features, dtype=torch.bfloat16, device=device)
        layer = SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=linear.in_features)
        model.set_submodule(name, layer)
    materialize(model, device)
    grouping.install()  # as a model does that is loaded
    return model
