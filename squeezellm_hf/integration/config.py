"""``SqueezeLLMConfig``: what a user asks for, and what a checkpoint's config.json records."""

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from squeezellm_hf.calibration import batches, datasets
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.integration import autoload, presets
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.nn.backend import check_backend
from squeezellm_hf.pipeline import budget, plan

QUANT_METHOD = "squeezellm"
SCHEMA_VERSION = 1

# Fields of the run, not of the result: never written to a checkpoint.
RUN_FIELDS = ("tokenizer", "work_dir", "blockwise", "dequantize", "backend")
TABLE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class ModuleRecord:
    """What it takes to build a quantized layer before its tensors are read.

    Attributes:
        bits: width of a table index.
        nnz: number of sparse values.
        table_dtype: "float16", "bfloat16" or "float32".
    """

    bits: int
    nnz: int = 0
    table_dtype: str = "float16"

    @classmethod
    def from_dict(cls, name: str, record: Any) -> "ModuleRecord":
        """Raise ValueError, naming the module, unless ``record`` is a sound JSON object."""
        where = f"quantization_config.modules[{name!r}]"
        if not isinstance(record, Mapping) or not set(record) <= {"bits", "nnz", "table_dtype"}:
            raise ValueError(
                f"{where} must be an object with bits, nnz and table_dtype, got {record!r}"
            )
        known = cls(**{"bits": 0, **record})
        for key, low, high in (("bits", 1, 8), ("nnz", 0, 2**31 - 1)):
            value = getattr(known, key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f"{where}.{key} must be an integer from {low} to {high}, got {value!r}"
                )
        if known.table_dtype not in list(TABLE_DTYPES):  # of a list: it may be unhashable
            raise ValueError(
                f"{where}.table_dtype must be one of {', '.join(TABLE_DTYPES)}, "
                f"got {known.table_dtype!r}"
            )
        return known


@dataclass
class SqueezeLLMConfig(QuantizationConfigMixin):
    """Quantize a model with SqueezeLLM (arXiv 2306.07629), while it is loaded or in memory.

    Every linear layer of the blocks becomes a table of 2**bits values per output row, one index
    per weight, and a sparse matrix of the few weights that the loss is most sensitive to or that
    are largest. Embeddings, norms and the output head stay as they are.

    Args:
        bits: Width of an index, 1 to 8; 4 loses little, 3 and 2 more. With average_bits or
            target_kl, the most that a layer may get.
        preset: "fast": k-means; "balanced": guided codebooks, several times the time and clearly
            nearer to the original; "best": guided codebooks and 300 steps of distillation (minutes
            on a GPU, hours on a CPU). Sets what is not given of codebook, distill_steps,
            distill_norms and distill_values, nothing else. Default: "balanced"; with dataset=None,
            which the others cannot do without, "fast".
        average_bits: Choose bits (from 2 up to "bits") and sparse part (0 to 4 times the fractions
            below) of each layer, so that all quantized layers together take at most so many bits a
            weight, tables and sparse part counted, and the predicted divergence from the original
            is least.
        target_kl: Choose them so that the layers are as small as a predicted divergence of the
            model from the original, in nats a token, of at most this allows. Before distillation.
        outlier_fraction: Part of each weight matrix that is kept at 16 bits for its magnitude
            (section 4.2; the paper's 0.45 % together with the next). Costs 32 bits a value.
        sensitive_fraction: Part that is kept at 16 bits for its sensitivity (0.05 % in the
            paper). Both 0: dense only.
        solver: "lloyd", or "exact" for the optimal table of every row (slower).
        codebook: How tables and indices are chosen: "kmeans", the paper's sensitivity-weighted
            k-means; "lnq", which from there searches for the least change of each layer's
            outputs; "guided" (GuidedQuant), the same with outputs weighted by squared gradients
            of the loss. The last is the most accurate; both take several times as long. Default:
            the preset's.
        guided_groups: Groups of output channels of a layer that get a Hessian of their own, of
            in_features^2 values in 32 bits each, for codebook "guided".
        lnq_rounds: How often tables and indices alternate, for codebooks "lnq" and "guided".
        lnq_sweeps: Sweeps over the columns in each round, for codebooks "lnq" and "guided".
        modules_to_not_convert: More modules that stay as they are, beside the output head, task
            heads, and what does not belong to the text part (vision towers, projectors). A
            pattern names whole components of a module's dotted name ("mlp", "layers.0"), or is a
            regular expression after "re:", matched from the beginning of the name. "!" before a
            pattern takes modules out of these default skips: "!vision_tower".
        quantize_lm_head: Quantize the output head, too. If it shares its weight with the input
            embeddings, it gets one of its own; the embeddings stay as they are.
        overrides: Other options for some modules, by such patterns; the first that fits counts:
            {"re:.*down_proj": {"bits": 4}, "layers.0": {"skip": True}}.
        dataset: Calibration data: "builtin" (Python's help texts, no network), "wikitext2",
            "c4", a Hub data set ("id" or "id:config"), a local .txt, .jsonl or .parquet file, a
            list of strings, token ids [n, length], or a list of batches: mappings from argument
            names of the model's forward to tensors, labels among them or not, all of which are
            used. None: no calibration, all weights count the same.
        dataset_split: Split of the data set.
        text_column: Column that holds the text; found by itself where there is only one.
        n_samples: Number of calibration sequences (100 in the paper; 10 suffice in its ablation).
        sequence_length: Tokens per sequence (512 in the paper).
        seed: Chooses the sequences.
        distill_steps: Updates of the tables on KL(original || quantized) after quantization; 0:
            none. 300 take minutes on a GPU, and hours on a CPU for all but the smallest models.
            Default: the preset's.
        distill_lr: Its peak learning rate, relative to the size of a layer's table entries.
            Default: 1e-3 for 4 bits and more, 1.5e-3 for 3, 2.5e-3 for fewer.
        distill_dataset: Its text, as for "dataset" (of the same split and column). Default: the
            calibration data's, as many tokens as the steps need. Some of it is held out.
        distill_batch_size: Sequences an update.
        distill_micro_batch_size: Sequences that pass through the model together; fewer need less
            memory. Default: all of an update.
        distill_sequence_length: Tokens a sequence.
        distill_norms: Train the weights of the norms, too. Default: the preset's.
        distill_values: Train the weights of the sparse part, too. Default: the preset's.
        distill_indices: Train the indices, too: 16 bytes more a weight while it lasts.
        tokenizer: Tokenizer, or the name of one. Default: the one that lies with the model.
        work_dir: Directory that keeps finished work, so that a killed run goes on where it was.
            Needs 4 bytes a weight there, for codebooks "lnq" and "guided" also the size of the
            Hessians that fit in memory together, and for distillation 2 * hidden_size bytes a
            token (without it, these go into a temporary directory).
        blockwise: Calibrate and quantize block by block, the model in CPU memory and one block at a
            time on the device: the same result, for models that do not fit there together with 4
            bytes a weight. None: where that is so. Keeps what every block gets in CPU memory,
            2 * hidden_size bytes a token and block.
        dequantize: On loading a quantized checkpoint: give back a plain model instead.
        backend: What computes this model's quantized layers: "auto", compiled kernels where they
            are, else PyTorch; "native", an error where they are not; "reference", plain PyTorch,
            slow, on every device. Not stored; may be given again on loading.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)
    bits: int = 4
    preset: str | None = None
    average_bits: float | None = None
    target_kl: float | None = None
    outlier_fraction: float = 0.004
    sensitive_fraction: float = 0.0005
    solver: str = "lloyd"
    codebook: str = None  # type: ignore[assignment]  # never None once the preset has set it
    guided_groups: int = 4
    lnq_rounds: int = 2
    lnq_sweeps: int = 4
    modules_to_not_convert: list[str] | None = None
    quantize_lm_head: bool = False
    overrides: dict[str, dict[str, Any]] | None = None
    dataset: Any = "builtin"
    dataset_split: str = "train"
    text_column: str | None = None
    n_samples: int = 100
    sequence_length: int = 512
    seed: int = 0
    distill_steps: int = None  # type: ignore[assignment]  # likewise
    distill_lr: float | None = None
    distill_dataset: Any = None
    distill_batch_size: int = 8
    distill_micro_batch_size: int | None = None
    distill_sequence_length: int = 512
    distill_norms: bool = None  # type: ignore[assignment]  # likewise
    distill_values: bool = None  # type: ignore[assignment]  # likewise
    distill_indices: bool = False
    tokenizer: Any = None
    work_dir: str | None = None
    blockwise: bool | None = None
    dequantize: bool = False
    backend: str = "auto"
    schema_version: int = field(default=SCHEMA_VERSION, init=False)
    modules: dict[str, dict[str, Any]] | None = field(default=None, init=False)
    versions: dict[str, str] | None = field(default=None, init=False)
    distilled: dict[str, float] | None = field(default=None, init=False)
    budget: dict[str, float | None] | None = field(default=None, init=False)
    converted_from: str | None = field(default=None, init=False)
    base_model: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Transformers reads __dict__, where a default that no argument can change is not.
        for item in dataclasses.fields(self):
            if not item.init:
                setattr(self, item.name, item.default)
        given = {name: getattr(self, name) for name in presets.PRESETS[presets.DEFAULT]}
        for name, value in presets.preset_values(self.preset, given, self.dataset).items():
            setattr(self, name, value)
        self.check()

    @property
    def parameters(self) -> SqueezeLLMParameters:
        """The method's parameters of a layer that no override fits."""
        return SqueezeLLMParameters(
            bits=self.bits,
            outlier_fraction=self.outlier_fraction,
            sensitive_fraction=self.sensitive_fraction,
            solver=self.solver,  # type: ignore[arg-type]
            codebook=self.codebook,  # type: ignore[arg-type]
            guided_groups=self.guided_groups,
            lnq_rounds=self.lnq_rounds,
            lnq_sweeps=self.lnq_sweeps,
        )

    @property
    def distillation(self) -> DistillationSettings | None:
        """The settings of codebook distillation, or None without it."""
        _check_integer("distill_steps", self.distill_steps, low=0)
        try:
            settings = DistillationSettings(
                steps=self.distill_steps or 1,
                lr=self.distill_lr,
                batch_size=self.distill_batch_size,
                micro_batch_size=self.distill_micro_batch_size,
                sequence_length=self.distill_sequence_length,
                train_norms=self.distill_norms,
                train_values=self.distill_values,
                train_indices=self.distill_indices,
                seed=self.seed,
            )
        except ValueError as error:
            # "train_norms must be ..." -> "distill_norms must be ..."
            raise ValueError(f"distill_{str(error).removeprefix('train_')}") from error
        return settings if self.distill_steps else None

    @property
    def records(self) -> dict[str, ModuleRecord]:
        """The quantized modules of a checkpoint by name; empty before quantization."""
        return {name: ModuleRecord.from_dict(name, r) for name, r in (self.modules or {}).items()}

    def check(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        defaults = self.parameters
        budget.check_limits(self.average_bits, self.target_kl)
        for name in ("average_bits", "target_kl"):
            if getattr(self, name) is not None and self.dataset is None and self.modules is None:
                raise ValueError(f"{name} needs calibration data and there is none (dataset=None)")
        for name in ("n_samples", "sequence_length"):
            _check_integer(name, getattr(self, name), low=1)
        _check_integer("seed", self.seed, low=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        data = (str, os.PathLike, list, tuple, torch.Tensor)
        for name in ("dataset", "distill_dataset"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, data):
                raise ValueError(
                    f"{name} must be a name, a path, a list of strings, token ids, a list of "
                    f"batches or None, got {value!r}"
                )
        no_text = self.dataset is None and self.distill_dataset is None
        if self.distillation is not None and self.modules is None and no_text:
            raise ValueError("distill_steps needs text: distill_dataset and dataset are both None")
        if self.blockwise not in (None, True, False):
            raise ValueError(f"blockwise must be True, False or None, got {self.blockwise!r}")
        if self.blockwise and self.distillation is not None:
            raise ValueError(
                "blockwise=True: distillation needs the whole original on the device; "
                "distill the quantized model afterwards, or leave distill_steps at 0"
            )
        for name in ("average_bits", "target_kl"):
            if self.blockwise and getattr(self, name) is not None:
                raise ValueError(
                    f"blockwise=True goes without {name}, which measures the whole model; "
                    f"got {name}={getattr(self, name)!r}"
                )
        check_backend(self.backend)
        if batches.is_batches(self.dataset):
            batches.check_batches(self.dataset)
        for name in ("dequantize", "quantize_lm_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.quantize_lm_head and self.distill_steps:
            raise ValueError(
                "quantize_lm_head=True goes without distillation, which needs the original's "
                f"output head; got distill_steps={self.distill_steps}"
            )
        for name, optional in (("dataset_split", False), ("text_column", True)):
            value = getattr(self, name)
            if not isinstance(value, str) and not (optional and value is None):
                raise ValueError(f"{name} must be a string, got {value!r}")
        if self.modules_to_not_convert is not None:
            if not isinstance(self.modules_to_not_convert, (list, tuple)):
                raise ValueError(
                    "modules_to_not_convert must be a list of patterns, "
                    f"got {self.modules_to_not_convert!r}"
                )
            plan.check_patterns(
                "modules_to_not_convert",
                [p[1:] if str(p)[:1] == "!" else p for p in self.modules_to_not_convert],
            )
        if self.overrides is not None:
            plan.check_overrides(self.overrides, defaults)
        if self.modules is not None and not isinstance(self.modules, Mapping):
            raise ValueError(f"modules must be an object, got {self.modules!r}")
        _ = self.records
        versions = self.versions
        if versions is not None and not (
            isinstance(versions, Mapping) and all(isinstance(v, str) for v in versions.values())
        ):
            raise ValueError(f"versions must be an object of strings, got {versions!r}")
        distilled = self.distilled
        keys = {"steps", "divergence_before", "divergence_after"}
        if distilled is not None and not (
            isinstance(distilled, Mapping)
            and set(distilled) == keys
            and all(isinstance(v, int | float) for v in distilled.values())
        ):
            raise ValueError(
                f"distilled must be an object of numbers ({', '.join(sorted(keys))}), "
                f"got {distilled!r}"
            )
        report = self.budget
        if report is not None and not (
            isinstance(report, Mapping)
            and all(v is None or isinstance(v, int | float) for v in report.values())
        ):
            raise ValueError(f"budget must be an object of numbers, got {report!r}")
        for name in ("converted_from", "base_model"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a string, got {value!r}")

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read the ``quantization_config`` of a config.json.

        Raises:
            ValueError: for a newer ``schema_version``, an unknown field, or a wrong value.
        """
        given = dict(config_dict)
        version = given.get("schema_version", SCHEMA_VERSION)
        _check_integer("schema_version", version, low=1)
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={version} was written by a newer squeezellm_hf; this one reads "
                f"up to {SCHEMA_VERSION}: pip install -U squeezellm-hf"
            )
        method = given.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {method!r}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise ValueError(
                f"quantization_config has the unknown field {unknown[0]!r}; "
                f"known are {', '.join(sorted(fields))}"
            )
        if given.get("modules") is not None:
            # A checkpoint from before there were presets: what it does not say was not done.
            given = {**presets.PRESETS["fast"], **given}
        used = {name: value for name, value in kwargs.items() if name in fields}
        config = cls(**{n: v for n, v in {**given, **used}.items() if fields[n].init})
        for name, value in given.items():
            if not fields[name].init:
                setattr(config, name, value)
        for name, value in used.items():
            if not fields[name].init:
                setattr(config, name, value)
        config.check()
        unused = {name: value for name, value in kwargs.items() if name not in used}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: no objects, no paths, no texts."""
        values = {k: v for k, v in self.__dict__.items() if k not in RUN_FIELDS}
        for name in ("dataset", "distill_dataset"):
            values[name] = datasets.describe(values[name])
        return copy.deepcopy(values)

    def get_loading_attributes(self) -> dict[str, Any]:
        """The fields that may be overridden when a quantized checkpoint is loaded."""
        return {"dequantize": self.dequantize, "backend": self.backend}


def _check_integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


# Importing transformers above may have run its side of the registration before the class existed.
autoload.install()
