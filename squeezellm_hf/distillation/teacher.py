"""The original's predictions, on disk: its last hidden states, from which its logits are made.

So the original is needed once, and not beside the quantized model. A token takes 2 * hidden_size
bytes (4 * without mixed precision, for a model in fp32); its full distribution, as bf16 logits,
would take 2 * vocab_size.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from squeezellm_hf.distillation.causal_lm import CausalLM


class TeacherStates:
    """Last hidden states of the original for a list of sequences, mapped from a file.

    Args:
        path: raw numbers, [n, sequence_length, hidden_size], little-endian.
        shape: of them.
        dtype: of them.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        size = math.prod(shape)
        expected = size * dtype.itemsize
        found = path.stat().st_size
        if found != expected:
            raise ValueError(f"{path} has {found} bytes, not {expected}; delete it to make it anew")
        self._states = torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)

    def batch(self, rows: Tensor) -> Tensor:
        """Those of some sequences, [len(rows), sequence_length, hidden_size], on the CPU."""
        return self._states[rows]


@torch.no_grad()
def record_teacher(
    original: CausalLM, sequences: Tensor, path: Path, *, batch_size: int, progress: bool = True
) -> TeacherStates:
    """Run the original over all sequences, appending to a file; a killed run goes on.

    Args:
        original: anywhere: also spread over devices or offloaded by accelerate.
        sequences: int64 [n, sequence_length].
        path: named after the model and the sequences by the caller.
        batch_size: sequences that pass through the model together.
        progress: show a progress bar.
    """
    model = original.model
    was_training = model.training
    model.eval()
    shape = (*sequences.shape, original.hidden_size)
    row_bytes = math.prod(shape[1:]) * original.dtype.itemsize
    try:
        with path.open("ab") as file:
            rows = file.tell() // row_bytes
            if rows < len(sequences):
                # Whole batches alone count: states of a batch of another size round otherwise.
                rows -= rows % batch_size
                file.truncate(rows * row_bytes)
            with tqdm(
                total=len(sequences),
                initial=rows,
                desc="Reading the original",
                unit="sequence",
                disable=not progress,
            ) as bar:
                for first in range(rows, len(sequences), batch_size):
                    batch = sequences[first : first + batch_size]
                    states = original.hidden_states(batch).cpu().contiguous()
                    file.write(states.view(torch.uint8).numpy().data)
                    bar.update(len(batch))
    finally:
        model.train(was_training)
    return TeacherStates(path, shape, original.dtype)
