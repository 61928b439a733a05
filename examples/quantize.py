"""Quantize a model of the Hub to 3 bits while it is loaded, and save it.

python examples/quantize.py HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-135M-Instruct-3bit
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf import SqueezeLLMConfig

source, target = sys.argv[1:3]

config = SqueezeLLMConfig(
    bits=3,
    overrides={"re:.*down_proj": {"bits": 4}},  # the layers that rounding hurts most
    dataset="builtin",  # or "wikitext2", "c4", a Hub id, a .txt file, a list of strings
    n_samples=32,
    work_dir=f"{target}.work",  # a killed run goes on from here
)
model = AutoModelForCausalLM.from_pretrained(
    source, dtype="auto", device_map="auto", quantization_config=config
)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
print(f"{target}: {model.get_memory_footprint() / 1e6:,.0f} MB in memory")
