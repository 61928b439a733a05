"""A model in CPU memory, quantized block by block on a GPU."""

import pytest
import torch
from transformers import LlamaForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from tests.conftest import tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SIZES = {
    "kmeans": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12},
    "guided": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("codebook", ["kmeans", "guided"])
def test_same_as_on_the_gpu_at_once_in_less_memory(codebook: str) -> None:
    def quantized(blockwise: bool) -> tuple[LlamaForCausalLM, int]:
        model = tiny_llama(**SIZES[codebook]).bfloat16()
        model = model if blockwise else model.cuda()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        config = SqueezeLLMConfig(
            bits=3, codebook=codebook, dataset=ids, n_samples=6, sequence_length=64,
            guided_groups=2, blockwise=blockwise or None,
        )  # fmt: skip
        quantize_model(model, None, config, progress=False)
        return model, torch.cuda.max_memory_allocated()

    ids = torch.randint(0, 128, (6, 64), generator=torch.Generator().manual_seed(0))
    whole, whole_peak = quantized(blockwise=False)
    one_by_one, peak = quantized(blockwise=True)
    assert peak < whole_peak
    assert all(parameter.device.type == "cpu" for parameter in one_by_one.parameters())
    expected = whole.state_dict()
    for name, tensor in one_by_one.state_dict().items():
        assert tensor.equal(expected[name].cpu()), name
