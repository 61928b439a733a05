"""Register with transformers and PEFT as soon as they are imported, without importing them.

Transformers has no plugin mechanism: a checkpoint whose ``quant_method`` is not registered is
loaded with random weights and a warning. torch, on its own import, calls the entry points of the
group ``torch.backends``; ours is :func:`install`, which watches for the import of
``transformers.quantizers.auto`` and registers our quantizer right after it. (Where that module is
what imports torch, it is too late to watch it, and ``transformers.modeling_utils``, without which
no model is loaded, is the next chance.)

It can be switched off with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, then ``import squeezellm_hf`` does
the same. PEFT, which has no plugin mechanism either, is told of our layers in the same way once its
LoRA model is imported.

This module imports nothing heavy, and swallows every error: a broken installation of this package
must never break ``import torch``, ``import transformers`` or ``import peft``.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
LORA = "peft.tuners.lora.model"
WATCHED = (REGISTRY, "transformers.modeling_utils", LORA)


def install() -> None:
    """Register now with what is imported already, with the rest once it is."""
    try:
        if not _register() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _warn(error, REGISTRY)


def _is_executing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _register(executed: str | None = None) -> bool:
    """Whether there is nothing to wait for, now that the module ``executed`` is complete."""
    registered = [_register_with(name, executed) for name in (REGISTRY, LORA)]
    return all(registered)


def _register_with(name: str, executed: str | None) -> bool:
    """Whether the time to register had come."""
    registry = sys.modules.get(name)
    if registry is None or (_is_executing(registry) and executed != name):
        return False
    try:
        if name == REGISTRY:
            from squeezellm_hf.integration.register import register

            register()
        else:
            from squeezellm_hf.integration.peft import install

            install()
    except Exception as error:
        # One of our own modules may have brought about the import that we watch for, and be half
        # imported itself. It calls install() again at its end.
        if not any(
            _is_executing(module)
            for name, module in list(sys.modules.items())
            if name.startswith("squeezellm_hf.integration.")
        ):
            _warn(error, name)
    return True


def _warn(error: Exception, name: str) -> None:
    # Where warnings are errors (python -W error), not even this one may break the import.
    loss = "SqueezeLLM checkpoints" if name == REGISTRY else "LoRA adapters on SqueezeLLM layers"
    with contextlib.suppress(Exception):
        warnings.warn(
            f"squeezellm_hf could not register with {name.partition('.')[0]} "
            f"({type(error).__name__}: {error}); {loss} will not load",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules through the other finders, and wraps their loaders."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """Executes the module with its own loader, then registers."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever inspects the module is to find its own loader.
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if _register(executed=module.__name__) and self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
