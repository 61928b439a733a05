"""A backward pass as a CUDA graph: a small model's thousands of kernels, started by one call.

Eager, a step of SmolLM2-135M starts some 10,000 kernels, and a GPU waits for the host.
"""

import torch
from torch import Tensor

from squeezellm_hf.distillation import objective
from squeezellm_hf.distillation.causal_lm import CausalLM

_WARM_UPS = 2


class GraphedBackward:
    """:func:`objective.backward` of batches of one shape.

    Gradients are added to the ``.grad`` that the parameters have when this is made, which must
    stay in its place: zero it (also after this is made), never set it to None.

    Args:
        model: on one CUDA device, a student in its place.
        shape: of a batch, (sequences, sequence_length).
        scale: of the loss.

    Raises:
        RuntimeError: if the model does what a graph cannot hold, such as reading a value.
    """

    def __init__(
        self,
        model: CausalLM,
        shape: tuple[int, int],
        scale: float,
    ) -> None:
        device = model.device
        self.input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.states = torch.zeros(*shape, model.hidden_size, dtype=model.dtype, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                objective.backward(model, self.input_ids, self.states, scale)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.loss = objective.backward(model, self.input_ids, self.states, scale)

    def __call__(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """As :func:`objective.backward`."""
        self.input_ids.copy_(input_ids, non_blocking=True)
        self.states.copy_(states, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
