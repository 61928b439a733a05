"""Cases of a comparison, written "method" or "method:option=value,option=value"."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.peers.gptq import GPTQ
from squeezellm_hf.evaluation.peers.half_quadratic import HQQ
from squeezellm_hf.evaluation.peers.nf4 import NF4
from squeezellm_hf.evaluation.peers.peer import Peer
from squeezellm_hf.evaluation.peers.uniform import RoundToNearest
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.in_memory import quantize_model

OURS = "squeezellm"
PEERS: dict[str, type[Peer]] = {"rtn": RoundToNearest, "hqq": HQQ, "nf4": NF4, "gptq": GPTQ}
# The bits of these meet near 3.3, 3.5, 4.3 and 4.5.
DEFAULT_CASES = (
    "squeezellm:bits=4,codebook=guided",
    "squeezellm:bits=3,codebook=guided",
    "rtn:bits=4,group_size=64",
    "rtn:bits=3,group_size=64",
    "hqq:bits=4,group_size=64",
    "hqq:bits=3,group_size=64",
    "nf4",
    "nf4:double_quant=true",
    "gptq:bits=4,group_size=128",
    "gptq:bits=4,group_size=64",
    "gptq:bits=3,group_size=128",
    "gptq:bits=3,group_size=64",
)
_NEXT_OPTION = re.compile(r",(?=[a-z_0-9]+=)")


@dataclass(frozen=True)
class SqueezeLLM(Peer):
    """This project's method.

    Attributes:
        options: Fields of `SqueezeLLMConfig`, without the data.
        work_dir: See there.
    """

    options: dict[str, Any] = field(default_factory=dict)
    work_dir: str | None = None

    def __post_init__(self) -> None:
        self._config(None)

    def quantize(
        self, model: Any, names: Sequence[str], sequences: Tensor, *, progress: bool = False
    ) -> int:
        """See `Peer.quantize`; `names` are what the config says."""
        quantize_model(model, None, self._config(sequences), progress=progress)
        return sum(8 * layer.n_bytes for layer in model_footprint(model).layers)

    def _config(self, sequences: Tensor | None) -> SqueezeLLMConfig:
        data: dict[str, Any] = {"dataset": "builtin"}
        if sequences is not None:
            n_samples, length = sequences.shape
            data = {"dataset": sequences, "n_samples": n_samples, "sequence_length": length}
        return SqueezeLLMConfig(**data, work_dir=self.work_dir, **self.options)


@dataclass(frozen=True)
class Case:
    """One model to quantize and measure.

    Attributes:
        text: As it was written.
        method: "squeezellm" or a key of `PEERS`.
        peer: The method with its options.
    """

    text: str
    method: str
    peer: Peer

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here, or None."""
        package = self.peer.package
        if package is None:
            return None
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install {package})"
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{package} cannot be imported: {error}"
        return None


def parse_case(text: str, work_dir: str | None = None) -> Case:
    """Read a case.

    Args:
        text: "nf4", "rtn:bits=3,group_size=64", "squeezellm:bits=3,codebook=guided". Values are
            JSON, or else strings.
        work_dir: Where "squeezellm" keeps finished work.

    Raises:
        ValueError: The method or an option is unknown, or a value is not allowed.
    """
    method, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in _NEXT_OPTION.split(rest) if rest else ():
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"case {text!r}: {item!r} is not option=value")
        options[key] = _value(value)
    try:
        if method == OURS:
            _check_options(options, _config_fields())
            return Case(text, method, SqueezeLLM(options, work_dir))
        if method not in PEERS:
            raise ValueError(f"{method!r} is no method; allowed are {', '.join((OURS, *PEERS))}")
        peer = PEERS[method]
        allowed = {option.name: option.type for option in dataclasses.fields(peer)}  # type: ignore[arg-type]
        _check_options(options, allowed)
        return Case(text, method, peer(**options))
    except ValueError as error:
        raise ValueError(f"case {text!r}: {error}") from error


def _config_fields() -> dict[str, None]:
    data = ("dataset", "dataset_split", "text_column", "n_samples", "sequence_length", "work_dir")
    return {
        option.name: None
        for option in dataclasses.fields(SqueezeLLMConfig)
        if option.init and option.name not in data
    }


def _check_options(options: dict[str, Any], allowed: dict[str, Any]) -> None:
    """Raise ValueError for an unknown option, or a value that is not of its type."""
    types: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool}
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(f"unknown option {name!r}; allowed are {', '.join(allowed)}")
        expected = types.get(allowed[name])
        if expected is not None and (
            not isinstance(value, expected) or isinstance(value, bool) != (expected is bool)
        ):
            raise ValueError(f"{name} must be of type {allowed[name]}, got {value!r}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
