"""Generate text with a quantized model: nothing but transformers is imported.

    python examples/pipeline.py MODEL "What is the capital of France?"

MODEL is a Hub id or a folder. An instruction-tuned model answers; another one goes on writing.
"""

import sys

from transformers import pipeline


def main(model: str, prompt: str) -> None:
    """Print what a model makes of a prompt."""
    generate = pipeline("text-generation", model=model)
    is_chat = generate.tokenizer.chat_template is not None
    text = [{"role": "user", "content": prompt}] if is_chat else prompt
    output = generate(text, max_new_tokens=48, do_sample=False, return_full_text=False)
    print(output[0]["generated_text"].strip())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
