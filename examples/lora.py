"""Fine-tune a quantized model with LoRA, and reload the adapter.

    python examples/quantize.py HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-3bit
    python examples/lora.py SmolLM2-3bit SmolLM2-3bit-lora --data my-text.txt

Needs PEFT: pip install "squeezellm-hf[peft]". Only the adapter is trained and saved; the quantized
weights stay as they are. A GPU is used where there is one.
"""

import argparse
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from squeezellm_hf.calibration.datasets import token_batches
from squeezellm_hf.evaluation.perplexity import perplexity

BATCH = 2
HELD_OUT = 8


def load(path: str) -> Any:
    """The quantized model on the device that is there, computing in the dtype it was saved in."""
    return AutoModelForCausalLM.from_pretrained(path, device_map="auto")


def fine_tune(model: Any, sequences: Tensor, output: str, *, steps: int, lr: float) -> Any:
    """Train an adapter on token ids [n, length] and save it to ``output``."""
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    settings = TrainingArguments(
        output_dir=f"{output}.checkpoints",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
    )
    data = [{"input_ids": row, "labels": row} for row in sequences]
    Trainer(model=model, args=settings, train_dataset=data).train()
    model.save_pretrained(output)
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Measure, train, measure, reload, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="quantized checkpoint: folder or Hub id")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--data", default="builtin", help="as for SqueezeLLMConfig(dataset=)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--sequence-length", type=int, default=256)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    sequences = token_batches(
        options.data,
        AutoTokenizer.from_pretrained(options.model),
        n_samples=options.steps * BATCH + HELD_OUT,
        sequence_length=options.sequence_length,
    )
    training, held_out = sequences[:-HELD_OUT], sequences[-HELD_OUT:]

    model = load(options.model)
    print(f"held-out loss before: {perplexity(model, held_out).nll:.4f}")
    model = fine_tune(model, training, options.output, steps=options.steps, lr=options.lr)
    print(f"held-out loss after:  {perplexity(model, held_out).nll:.4f}")
    reloaded = PeftModel.from_pretrained(load(options.model), options.output)
    print(f"reloaded:             {perplexity(reloaded, held_out).nll:.4f}")


if __name__ == "__main__":
    main()
