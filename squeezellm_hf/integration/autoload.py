"""Register with transformers as soon as it is imported, without importing it.

Transformers has no plugin mechanism: a checkpoint whose ``quant_method`` is not registered is
loaded with random weights and a warning. torch, on its own import, calls the entry points of the
group ``torch.backends``; ours is :func:`install`, which watches for the import of
``transformers.quantizers.auto`` and registers our quantizer right after it.

It can be switched off with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, then ``import squeezellm_hf`` does
the same. It imports nothing heavy, and swallows every error: a broken installation of this
package must never break ``import torch`` or ``import transformers``.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType

WATCHED = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' quantizers are imported already, otherwise once they are."""
    try:
        module = sys.modules.get(WATCHED)
        if module is not None and not _is_executing(module):
            _register()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _warn(error)


def _is_executing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _register() -> None:
    try:
        from squeezellm_hf.integration.register import register

        register()
    except Exception as error:
        # One of our own modules may have brought about the import that we watch for, and be half
        # imported itself. It calls install() again at its end.
        if not any(
            _is_executing(module)
            for name, module in list(sys.modules.items())
            if name.startswith("squeezellm_hf.integration.")
        ):
            _warn(error)


def _warn(error: Exception) -> None:
    # Where warnings are errors (python -W error), not even this one may break the import.
    with contextlib.suppress(Exception):
        warnings.warn(
            f"squeezellm_hf could not register with transformers ({type(error).__name__}: {error}); "
            "SqueezeLLM checkpoints will not load",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched module through the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Executes the module with its own loader, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        # get_source, get_filename, ...: whoever inspects the module finds its own loader's.
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        _register()
