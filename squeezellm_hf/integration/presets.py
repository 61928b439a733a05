"""Presets: what a user who gives only a name gets.

A preset stands behind the fields that were not given, and nowhere else: a config holds effective
values from the moment it is made, a checkpoint records these, and reading it applies no preset.
"""

from typing import Any

# Fields with a preset's value; None in the signature of SqueezeLLMConfig, never in a config.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "codebook": "kmeans",
        "distill_steps": 0,
        "distill_norms": False,
        "distill_values": False,
    },
    "balanced": {
        "codebook": "guided",
        "distill_steps": 0,
        "distill_norms": False,
        "distill_values": False,
    },
    "best": {
        "codebook": "guided",
        "distill_steps": 300,
        "distill_norms": True,
        "distill_values": True,
    },
}
DEFAULT = "balanced"
WITHOUT_DATA = "fast"


def preset_values(preset: Any, given: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """Values of the fields that a preset sets.

    Args:
        preset: its name; None: :data:`DEFAULT`, or :data:`WITHOUT_DATA` without calibration data.
        given: values by field; those that are None were not given.
        dataset: None: there is no calibration data.

    Raises:
        ValueError: for an unknown name, or a preset that needs the data that there is not.
    """
    if preset is None:
        preset = DEFAULT if dataset is not None else WITHOUT_DATA
    elif not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)} or None, got {preset!r}")
    elif dataset is None and given["codebook"] is None and preset != WITHOUT_DATA:
        raise ValueError(
            f"preset={preset!r} needs calibration data and there is none (dataset=None); give a "
            f"dataset, or choose preset={WITHOUT_DATA!r}"
        )
    return {
        name: default if given[name] is None else given[name]
        for name, default in PRESETS[preset].items()
    }
