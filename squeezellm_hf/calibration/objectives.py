"""What calibration differentiates: a scalar for each calibration sample, by the kind of model.

The squared gradients of a weight, summed over samples, are to be the diagonal of a Fisher
information matrix: of the model's own loss, where plain text says what it should predict
(empirical Fisher, as in SqueezeLLM), else of a model of its outputs (Martens, "New Insights and
Perspectives on the Natural Gradient Method", JMLR 21 (2020), sections 5 and 9):

    logits      labels y are drawn from the model's own distribution p(y | x), and the loss is
                -log p(y | x): its gradients have the true Fisher as their second moment;
    others      outputs f(x) are the mean of a Gaussian of unit variance. Its Fisher is J^T J with
                J = df/dw. For signs v drawn at random E[v v^T] = I, hence the gradient g of
                <v, f(x)> has E[g g^T] = J^T J (Hutchinson's estimator).

Random numbers depend on the seed and the index of the sample alone, so that a run that is resumed
draws the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# A row of token ids, int64 [length], or the keyword arguments of the model's forward.
Sample = Tensor | Mapping[str, Any]

IGNORED = -100  # the label of a position that does not count
_MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Objective:
    """The loss of a model on a calibration sample; this one: as the sample's own labels say.

    Attributes:
        seed: of random numbers.
    """

    seed: int = 0

    def __call__(self, model: Any, sample: Sample, index: int) -> Tensor:
        """The loss, a scalar.

        Args:
            model: in evaluation mode.
            sample: on the device of the model's inputs. Labels that it holds are used as they are.
            index: of the sample.

        Raises:
            ValueError: if the model gives no loss, or the sample lacks what it takes.
        """
        if isinstance(sample, Tensor):
            sample = self.from_text(sample.unsqueeze(0))
        inputs = dict(sample)
        if "labels" not in inputs:
            return self.unlabelled(model, inputs, index)
        return _loss(call(model, inputs), model)

    def from_text(self, ids: Tensor) -> dict[str, Any]:
        """Arguments of forward of token ids [1, length]."""
        return {"input_ids": ids}

    def unlabelled(self, model: Any, inputs: dict[str, Any], index: int) -> Tensor:
        """The loss of inputs without labels."""
        raise NotImplementedError

    def _generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed % 2**31 * 2**31 + index)


@dataclass(frozen=True)
class CausalLM(Objective):
    """The mean cross-entropy of each next token (SqueezeLLM, section 4.1)."""

    def unlabelled(self, model: Any, inputs: dict[str, Any], index: int) -> Tensor:
        """The labels are the input; where its attention_mask is 0, they do not count."""
        labels = _ids(inputs, index)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        return _loss(call(model, inputs | {"labels": labels}), model)


@dataclass(frozen=True)
class MaskedLM(Objective):
    """The mean cross-entropy of tokens that were hidden.

    As in BERT (arXiv 1810.04805, section 3.1): 15 % of the tokens are to be predicted; of these
    80 % are replaced by the mask token, 10 % by a random one, 10 % are left as they are.

    Attributes:
        vocab_size: random tokens are below it.
        mask_token: its id; None: random tokens take its place.
    """

    vocab_size: int = 0
    mask_token: int | None = None

    def unlabelled(self, model: Any, inputs: dict[str, Any], index: int) -> Tensor:
        """At least one token is hidden, and none where attention_mask is 0."""
        ids = _ids(inputs, index)
        generator = self._generator(index)
        draw = torch.rand(ids.shape, generator=generator).to(ids.device)
        kind = torch.rand(ids.shape, generator=generator).to(ids.device)
        noise = torch.randint(self.vocab_size, ids.shape, generator=generator).to(ids.device)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            draw = draw.masked_fill(mask == 0, 2.0)
        chosen = (draw < _MASKED_SHARE) | (draw == draw.min())
        hidden = torch.full_like(ids, self.mask_token) if self.mask_token is not None else noise
        hidden = torch.where(kind < 0.8, hidden, torch.where(kind < 0.9, noise, ids))
        inputs = inputs | {
            "input_ids": torch.where(chosen, hidden, ids),
            "labels": ids.masked_fill(~chosen, IGNORED),
        }
        return _loss(call(model, inputs), model)


@dataclass(frozen=True)
class SampledLabels(Objective):
    """The cross-entropy of labels drawn from the model's own logits: of a classifier, say."""

    def unlabelled(self, model: Any, inputs: dict[str, Any], index: int) -> Tensor:
        """Logits [..., classes]; the mean over all positions."""
        logits = call(model, inputs).logits.flatten(0, -2).float()
        odds = logits.detach().softmax(dim=-1).cpu()
        labels = torch.multinomial(odds, 1, generator=self._generator(index)).squeeze(1)
        return functional.cross_entropy(logits, labels.to(logits.device))


@dataclass(frozen=True)
class Outputs(Objective):
    """A random combination of all outputs: the Fisher of a Gaussian around them.

    Attributes:
        encoder_decoder: the first half of a text goes into the encoder, the second into the
            decoder.
    """

    encoder_decoder: bool = False

    def from_text(self, ids: Tensor) -> dict[str, Any]:
        """Arguments of forward of token ids [1, length]."""
        if not self.encoder_decoder:
            return {"input_ids": ids}
        first, second = halves(ids)
        return {"input_ids": first, "decoder_input_ids": second}

    def unlabelled(self, model: Any, inputs: dict[str, Any], index: int) -> Tensor:
        """The sum over output tensors of <v, f> / sqrt(size of f), v random signs."""
        generator = self._generator(index)
        total: Tensor | None = None
        for output in _outputs(call(model, inputs)):
            signs = torch.randint(2, output.shape, generator=generator) * 2 - 1
            term = (output.float() * signs.to(output.device)).sum() / output.numel() ** 0.5
            total = term if total is None else total + term
        if total is None:
            raise ValueError(f"{type(model).__name__} gives no floating-point output to calibrate")
        return total


@dataclass(frozen=True)
class Seq2SeqLM(Objective):
    """The mean cross-entropy of the second half of a text, the encoder reading the first half.

    (The prefix language model of T5, arXiv 1910.10683, section 3.2.)
    """

    def from_text(self, ids: Tensor) -> dict[str, Any]:
        """Arguments of forward of token ids [1, length]."""
        first, second = halves(ids)
        return {"input_ids": first, "labels": second}

    def unlabelled(self, model: Any, inputs: dict[str, Any], index: int) -> Tensor:
        """With decoder_input_ids: labels drawn from the model; else the input, in two halves."""
        if "decoder_input_ids" in inputs:
            return SampledLabels(self.seed).unlabelled(model, inputs, index)
        if set(inputs) - {"attention_mask"} != {"input_ids"}:
            raise ValueError(
                f"dataset[{index}] has {', '.join(inputs)}; {type(model).__name__} also needs "
                "labels or decoder_input_ids"
            )
        return self(model, inputs["input_ids"][0], index)


def call(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The result of forward, without a cache where it knows of one."""
    arguments = signature(model.forward).parameters.values()
    known = any(a.name == "use_cache" for a in arguments) or (
        hasattr(getattr(model, "config", None), "use_cache")
        and any(a.kind is a.VAR_KEYWORD for a in arguments)
    )
    if known:
        inputs = {"use_cache": False, **inputs}
    return model(**inputs)


def to_device(sample: Sample, device: torch.device) -> Sample:
    """The sample with all its tensors on ``device``."""
    if isinstance(sample, Tensor):
        return sample.to(device)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.items()}


def halves(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [1, length] in two; a single token twice."""
    middle = max(1, ids.shape[1] // 2)
    return ids[:, :middle], ids[:, middle:] if ids.shape[1] > 1 else ids


def _ids(inputs: Mapping[str, Any], index: int) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(f"dataset[{index}] has neither labels nor input_ids to make them of")
    return ids


def _loss(output: Any, model: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(model).__name__} gives no loss for labels")
    return loss


def _outputs(result: Any) -> Iterator[Tensor]:
    values = result.values() if isinstance(result, Mapping) else result
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
