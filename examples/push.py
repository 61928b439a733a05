"""Put a quantized model on the Hub, with a model card that says how it was made.

hf auth login
python examples/push.py SmolLM2-135M-Instruct-3bit me/SmolLM2-135M-Instruct-SqueezeLLM-3bit
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, repo_id = sys.argv[1:3]

AutoModelForCausalLM.from_pretrained(folder).push_to_hub(repo_id)
AutoTokenizer.from_pretrained(folder).push_to_hub(repo_id)
