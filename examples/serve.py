"""Ask a server of a quantized model, as one asks any OpenAI-compatible server.

pip install "squeezellm-hf[serve]"
transformers serve SmolLM2-135M-Instruct-4bit
python examples/serve.py SmolLM2-135M-Instruct-4bit "What is the capital of France?"
"""

import os
import sys

from openai import OpenAI

model, question = sys.argv[1:3]

address = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
client = OpenAI(base_url=address, api_key="none")
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=100,
    stream=True,
)
for event in answer:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()
