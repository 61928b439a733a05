"""The model card of a quantized model."""

from collections.abc import Iterable
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from squeezellm_hf.integration.card_results import evaluation_results
from squeezellm_hf.integration.card_usage import task, usage
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.nn import SqueezeLLMLinear

# Tells a card of ours, which the next save may replace, from one that a person wrote.
MARKER = "<!-- Written by squeezellm_hf; remove this line to keep your changes. -->"

_BODY = """
{marker}

# {title}

{original} quantized with [SqueezeLLM](https://arxiv.org/abs/2306.07629): every weight of the
linear layers is an index into a table of its row, chosen by {codebook}; the few
outliers and most sensitive weights are kept at 16 bits in a sparse matrix.

| | |
|---|---|
| Bits per quantized weight | {bits_per_weight:.2f} (indices, tables and sparse part together) |
| Width of an index | {widths} |
| Sparse part | {sparse:.2%} of the quantized weights |
| Quantized | {weights:,} weights in {layers} linear layers |
| Size of all tensors | {megabytes:,.0f} MB |
| Calibration data | {data} |
| Distilled | {distilled} |
| Made with | {versions} |

## Use

```bash
pip install squeezellm-hf
```

```python
{usage}
```

Nothing else needs to be imported: the installed package registers itself with Transformers.
"""

_CODEBOOKS = {
    "kmeans": "sensitivity-weighted k-means",
    "lnq": "layer-wise non-uniform quantization (LNQ)",
    "guided": "layer-wise non-uniform quantization guided by the end loss "
    "([GuidedQuant](https://arxiv.org/abs/2505.07004))",
}


def model_card(model: Any, repository: str) -> ModelCard:
    """A card that states bits per weight, method, calibration data and how to load.

    Args:
        model: quantized, with its ``SqueezeLLMConfig`` in ``model.config.quantization_config``.
        repository: the id that the card tells users to load.
    """
    config: SqueezeLLMConfig = model.config.quantization_config
    layers = [module for module in model.modules() if isinstance(module, SqueezeLLMLinear)]
    widths = sorted({layer.bits for layer in layers})
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    original = config.base_model
    owner, _, title = repository.rpartition("/")
    results = evaluation_results(getattr(model.config, "name_or_path", None))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task(model),
        base_model=original,
        base_model_relation="quantized" if original else None,
        quantized_by=owner or None,
        tags=["squeezellm", "quantized", *(f"{bits}-bit" for bits in widths)],
        model_name=title if results.metadata else None,
        eval_results=results.metadata,
    )
    body = _BODY.format(
        marker=MARKER,
        title=title,
        usage=usage(model, repository),
        original=f"[{original}](https://huggingface.co/{original})" if original else "A model",
        codebook=_CODEBOOKS[config.codebook],
        bits_per_weight=8 * sum(layer.weight_bytes for layer in layers) / weights,
        widths=", ".join(f"{bits} bits" for bits in widths),
        sparse=sum(layer.nnz for layer in layers) / weights,
        weights=weights,
        layers=len(layers),
        megabytes=model.get_memory_footprint() / 1e6,
        data=_calibration(config),
        distilled=_distillation(config),
        versions=", ".join(f"{name} {v}" for name, v in (config.versions or {}).items()),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}{results.section}")
    add_tags(card, getattr(model, "model_tags", None) or ())
    return card


def add_tags(card: ModelCard, tags: Iterable[str]) -> None:
    """Add to the tags of ``card`` those that it has not."""
    known = list(card.data.get("tags") or [])
    new = [tag for tag in dict.fromkeys(tags) if tag not in known]
    if new:
        card.data["tags"] = known + new


def _calibration(config: SqueezeLLMConfig) -> str:
    if config.converted_from is not None:
        return f"not known; converted from {config.converted_from}"
    described = config.to_dict()["dataset"]
    if described is None:
        return "none; all weights count the same"
    if " batches sha256:" in described:
        return str(described)
    return (
        f"{described}, {config.n_samples} sequences of {config.sequence_length} tokens, "
        f"seed {config.seed}"
    )


def _distillation(config: SqueezeLLMConfig) -> str:
    record = config.distilled
    if not record:
        return "no"
    return (
        f"{record['steps']:.0f} steps on the tables, KL to the original on held-out text "
        f"{record['divergence_before']:.4f} -> {record['divergence_after']:.4f} nats a token"
    )
