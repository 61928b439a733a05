"""A causal language model in two halves: up to the last hidden states, and from there to logits.

The output head is not quantized, so the two models share it: the original's last hidden states
stand for its logits, at hidden_size instead of vocab_size numbers a token.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.nn import SqueezeLLMLinear

_PROBE_TOKENS = 4


class CausalLM:
    """The two halves of a model.

    Args:
        model: a causal language model as Transformers has them: called with ``input_ids=`` and
            ``use_cache=``, its result has ``.logits``, and its ``get_decoder()``, called with the
            same, has ``.last_hidden_state``.
        mixed_precision: bf16 in matrix products, whatever the dtype of the model.

    Raises:
        ValueError: if the output head is quantized, or the logits of the model are not a function
            of its decoder's last hidden states.
    """

    def __init__(self, model: Any, *, mixed_precision: bool = False) -> None:
        self.model = model
        self.mixed_precision = mixed_precision
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} cannot be distilled: it has an encoder and a decoder, and "
                "plain text has only one side"
            )
        head = model.get_output_embeddings()
        if head is None or isinstance(head, SqueezeLLMLinear):
            raise ValueError(
                f"{type(model).__name__} cannot be distilled: its output head is "
                f"{'missing' if head is None else 'quantized'}"
            )
        self.decoder = model.get_decoder()
        self.device = _device(model)
        self.vocab_size: int = head.weight.shape[0]
        self._output_type: Any = None
        self._check()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that hidden states are kept in."""
        return torch.bfloat16 if self.mixed_precision else self.model.dtype

    def _autocast(self) -> Any:
        if not self.mixed_precision:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """int64 [batch, length] -> what the output head is given, [batch, length, hidden_size]."""
        with self._autocast():
            output = self.decoder(input_ids=input_ids.to(self.device), use_cache=False)
        self._output_type = type(output)
        return output.last_hidden_state.to(self.dtype)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size], by the model's own code (scale, soft cap, ...)."""
        tokens = torch.zeros(1, len(hidden_states), dtype=torch.int64, device=self.device)
        with self._given(hidden_states[None].to(self.dtype)), self._autocast():
            return self.model(input_ids=tokens, use_cache=False).logits[0]

    @contextlib.contextmanager
    def _given(self, hidden_states: Tensor) -> Iterator[None]:
        """While it lasts, the decoder does nothing but return these hidden states."""
        output = self._output_type(last_hidden_state=hidden_states)
        own = self.decoder.__dict__.get("forward")
        self.decoder.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            if own is None:
                del self.decoder.forward
            else:
                self.decoder.forward = own

    @torch.no_grad()
    def _check(self) -> None:
        tokens = torch.arange(_PROBE_TOKENS, device=self.device)[None] % self.vocab_size
        with self._autocast():
            expected = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        hidden_states = self.hidden_states(tokens)[0]
        self.hidden_size = hidden_states.shape[-1]
        actual = self.logits(hidden_states).float()
        if actual.shape != expected.shape or not torch.allclose(
            actual, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
        ):
            raise ValueError(
                f"{type(self.model).__name__} cannot be distilled: its logits are not a function "
                f"of the last hidden states of its {type(self.decoder).__name__}"
            )


def _device(model: Any) -> torch.device:
    """Where token ids go."""
    device: torch.device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    # Offloaded: accelerate moves weights to the first device of its map that computes.
    places = getattr(model, "hf_device_map", {}).values()
    return torch.device(next((p for p in places if p not in ("cpu", "disk")), "cpu"))
