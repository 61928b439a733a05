"""Experts of a mixture whose weights are linear layers of their own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """y[t] = sum over j of weight[t, j] * down(activation(up(x[t]))), of expert index[t, j].

    The experts are the children ``0``, ``1``, ..., each a dictionary of two linear layers of any
    kind: ``experts.0.gate_up_proj`` and ``experts.0.down_proj``, say.

    Only chosen experts are computed, each once, on all of its tokens. How many tokens each expert
    has is read from the device once a call. The sum is deterministic: the results of a token are
    added in the order of the router.

    Args:
        experts: one ``nn.ModuleDict`` an expert, with the layers ``up`` and ``down``.
        up: name of the first layer: [hidden_size] -> what ``activation`` takes.
        down: name of the second layer: what ``activation`` gives -> [hidden_size].
        activation: applied between them; the gating, where there is one, is part of it.
        norm: applied to the output of an expert, before its weight.
    """

    activation: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        experts: Sequence[nn.ModuleDict],
        up: str,
        down: str,
        activation: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.up, self.down = up, down
        # Not registered: what they are made of is, by whoever knows its name.
        self.__dict__["activation"] = activation
        self.__dict__["norm"] = norm
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> Any:
        return self._modules[str(index)]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self.num_experts))

    # Which experts run depends on the data: a compiled graph ends here and goes on behind it.
    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Run the chosen experts.

        Args:
            hidden_states: [tokens, hidden_size].
            top_k_index: int64 [tokens, k]; ``num_experts`` stands for no expert. None: as for
                Llama 4, ``hidden_states`` are [num_experts * tokens, hidden_size], the tokens once
                for each expert, weighed already, zero where it is not chosen.
            top_k_weights: [tokens, k], None without ``top_k_index``.

        Returns:
            Of the shape and dtype of ``hidden_states``.
        """
        if top_k_index is None or top_k_weights is None:
            return self._weighed(hidden_states)
        tokens, k = top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        sizes = torch.bincount(chosen, minlength=self.num_experts).tolist()
        outputs = self._run_sorted(hidden_states[order // k], sizes[: self.num_experts])
        weighted = outputs * top_k_weights.flatten()[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        states = weighted[place].view(tokens, k, hidden_states.shape[-1]).sum(dim=1)
        return states.to(hidden_states.dtype)

    def _weighed(self, hidden_states: Tensor) -> Tensor:
        """Where no layer has a bias, rows of zeros stay rows of zeros."""
        chosen = hidden_states.detach().ne(0).any(dim=-1)
        sizes = chosen.view(self.num_experts, -1).sum(dim=1).tolist()
        rows = chosen.nonzero()[:, 0]
        outputs = self._run_sorted(hidden_states[rows], sizes)
        return torch.zeros_like(hidden_states).index_copy(0, rows, outputs)

    def _run_sorted(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows of expert 0, then those of expert 1, ...; rows left over are of no expert."""
        called = [index for index, size in enumerate(sizes) if size]
        if not called:
            return torch.zeros_like(rows)
        parts = [sizes[index] for index in called]
        chosen = rows[: sum(parts)]
        # What is the same for all is done once: at few tokens it is the calls that take time.
        states = self.activation(self._each(called, self.up, chosen, parts))
        outputs = self._each(called, self.down, states, parts)
        if self.norm is not None:
            outputs = self.norm(outputs)
        without = rows[len(chosen) :]
        return torch.cat([outputs, torch.zeros_like(without)]) if len(without) else outputs

    def _each(self, called: Sequence[int], name: str, rows: Tensor, parts: list[int]) -> Tensor:
        """The layer ``name`` of each called expert, on its part of the rows."""
        pieces = zip(called, rows.split(parts), strict=True)
        return torch.cat([self[index][name](piece) for index, piece in pieces])

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"
