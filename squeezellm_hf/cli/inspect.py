"""`squeezellm inspect MODEL`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from squeezellm_hf.cli.loading import check_name
from squeezellm_hf.evaluation.footprint import ModelFootprint, footprint
from squeezellm_hf.evaluation.headers import checkpoint_sizes, linear_sizes
from squeezellm_hf.evaluation.report import (
    Column,
    console,
    decimals,
    percent,
    print_table,
    write_json,
)

DESCRIPTION = """List the layers of a checkpoint: shape, bits, sparse values, bytes.

  squeezellm inspect OUT
  squeezellm inspect you/model-4bit --json layers.json

Reads config.json and the headers of the safetensors files, not the weights:
of a Hub repository some kilobytes are downloaded.

Bits a weight are counted honestly: indices, lookup tables, sparse values,
their columns and row pointers, and padding, over the weights that are
quantized. Biases, embeddings, norms and the output head are not quantized,
and count in the size of the whole model."""

COLUMNS = (
    Column("module", "module"),
    Column("shape", "out x in"),
    Column("bits", "bits"),
    Column("sparse_fraction", "sparse", percent(3)),
    Column("bytes", "bytes", decimals(0)),
    Column("bits_per_weight", "bits/weight", decimals(3)),
)


@dataclass
class Command:
    """List the layers of a checkpoint."""

    model: Positional[str]
    """Hub id or local folder."""
    json: Path | None = None
    """Write the table to this file, with the totals."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    token: str | None = None
    """Hub access token; by default that of `hf auth login` or of HF_TOKEN."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories whose code you have read."""

    def run(self) -> None:
        """Print the table and the totals."""
        check_name(self.model)
        config = self._config()
        sizes = checkpoint_sizes(self.model, revision=self.revision, token=self.token)
        modules = linear_sizes(config, trust_remote_code=self.trust_remote_code)
        size = footprint(sizes, modules)
        rows = [
            {
                "module": layer.name,
                "shape": f"{layer.out_features} x {layer.in_features}",
                "bits": layer.bits,
                "sparse_fraction": layer.sparse_fraction,
                "bytes": layer.n_bytes,
                "bits_per_weight": layer.bits_per_weight,
            }
            for layer in sorted(size.layers, key=lambda layer: _natural(layer.name))
        ]
        if rows:
            print_table(rows, COLUMNS, self.model)
        else:
            console().print(f"{self.model} has no layer that SqueezeLLM quantized")
        _print_totals(size, config)
        if self.json is not None:
            write_json(self.json, rows, model=self.model, totals=_totals(size))

    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self.model,
            revision=self.revision,
            token=self.token,
            trust_remote_code=self.trust_remote_code,
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Order layers.2 before layers.10."""
    return [(int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _totals(size: ModelFootprint) -> dict[str, Any]:
    return {
        "quantized_layers": len(size.layers),
        "quantized_weights": size.n_quantized_weights,
        "sparse_fraction": size.sparse_fraction,
        "bits_per_weight": size.bits_per_weight,
        "nominal_bits_per_weight": size.nominal_bits_per_weight,
        "quantized_bytes": size.n_bytes - size.other_bytes,
        "other_bytes": size.other_bytes,
        "bytes": size.n_bytes,
    }


def _print_totals(size: ModelFootprint, config: Any) -> None:
    quantized = size.n_bytes - size.other_bytes
    lines = [
        ("whole model", f"{size.n_bytes / 1e6:,.1f} MB in {len(size.others):,} other tensors")
        if not size.layers
        else (
            "whole model",
            f"{size.n_bytes / 1e6:,.1f} MB: {quantized / 1e6:,.1f} MB of quantized layers, "
            f"{size.other_bytes / 1e6:,.1f} MB of embeddings, norms, biases and the rest",
        )
    ]
    if size.layers:
        lines.append(
            (
                "quantized",
                f"{size.n_quantized_weights:,} weights in {len(size.layers)} layers at "
                f"{size.bits_per_weight:.3f} bits a weight "
                f"({size.nominal_bits_per_weight:.3f} without padding), "
                f"{100 * size.sparse_fraction:.3f} % of them sparse",
            )
        )
        lines.append(("calibration", _calibration(config)))
    for label, text in lines:
        console().print(f"{label:>12}  {text}")


def _calibration(config: Any) -> str:
    record = getattr(config, "quantization_config", None) or {}
    record = record if isinstance(record, dict) else record.to_dict()
    if record.get("converted_from") is not None:
        return f"not known: converted from {record['converted_from']}"
    if record.get("dataset") is None:
        return "none is recorded: all weights counted the same"
    return (
        f"{record['dataset']}, {record.get('n_samples')} x {record.get('sequence_length')} tokens, "
        f"seed {record.get('seed')}"
    )
