"""Optional packages: broken ones are hidden from Megatron-Core, missing ones are named with their remedy.

Megatron-Core asks for Transformer Engine and Apex with `try: import ... except ImportError`, which two things defeat:

* the `transformer-engine` wheel installs on any machine and raises RuntimeError on import where it cannot work;
* the package index has an `apex` that is a web toolkit, and Megatron-Core takes any `apex` for NVIDIA's.

A package that is hidden is None in `sys.modules`, so that importing it raises ModuleNotFoundError.
"""

import importlib
import logging
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

_HOST = "megatron.core"
_TRANSFORMER_ENGINE = "transformer_engine"

# Import name -> extra of setup.py that installs it; None: built from source.
_EXTRAS = {
    _TRANSFORMER_ENGINE: "te",
    "apex": None,
    "deepspeed": "deepspeed",
    "fla": "fla",
    "triton": "triton",
    "transformers": "convert",
    "gigatoken": "preprocess",
    "webdataset": "preprocess",
    "ray": "ray",
}
_hidden: dict[str, str] = {}  # name -> why
_APEX_REMEDY = (
    "build NVIDIA/apex from source with --cpp_ext and --cuda_ext; never pip install apex, which is another project"
)


class MissingPackageError(ImportError):
    """An optional package is needed and cannot be used: which, what for, and the remedy."""


class _BeforeMegatron(MetaPathFinder):
    """Hides broken packages when Megatron-Core is first imported; it finds no module itself.

    Only an import tells whether Transformer Engine works, and that takes seconds and may start CUDA. So it happens when
    Megatron-Core would do the same, not when megatron_gdn is imported.
    """

    def find_spec(self, name, path=None, target=None):
        if name == _HOST and self in sys.meta_path:
            sys.meta_path.remove(self)
            _hide_now()
        return None


def hide_broken_packages() -> None:
    """Make Megatron-Core's import safe from a broken `transformer_engine` and a foreign `apex`.

    Cheap: the packages are looked at when `megatron.core` is first imported, or now if it has been already. What is
    hidden is logged once, as a warning. Idempotent.
    """
    if _HOST in sys.modules:
        _hide_now()
    elif not any(isinstance(finder, _BeforeMegatron) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMegatron())


def require(name: str, *, extra: str | None, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: import name, such as "deepspeed".
        extra: extra of megatron_gdn that installs it; None for a package built from source (Apex).
        purpose: the setting that needs it, such as "engine=deepspeed".

    Raises:
        MissingPackageError: it is not installed, or does not import.
    """
    problem = _problem(name)
    if problem is None:
        return importlib.import_module(name)
    raise MissingPackageError(f"{name} is needed for {purpose} and {problem}: {_remedy(extra)}.", name=name)


def status() -> dict[str, str]:
    """Version, or problem and remedy, of every optional package; imports those that are installed."""
    report = {}
    for name, extra in _EXTRAS.items():
        problem = _problem(name)
        version = None if problem else getattr(sys.modules[name], "__version__", "installed, version unknown")
        report[name] = version or f"{problem}: {_remedy(extra)}"
    return report


def _remedy(extra: str | None) -> str:
    return f"run pip install -e '.[{extra}]' in the checkout of megatron_gdn" if extra else _APEX_REMEDY


def _hide_now() -> None:
    for name in (_TRANSFORMER_ENGINE, "apex"):
        if _find(name) is not None and (problem := _problem(name)):
            _hide(name)
            _hidden[name] = problem
            logger.warning("%s %s: training goes on without it", name, problem)


def _hide(name: str) -> None:
    for loaded in [module for module in sys.modules if module.startswith(f"{name}.")]:
        del sys.modules[loaded]
    sys.modules[name] = None


def _problem(name: str) -> str | None:
    """Why a package cannot be used; None when it can, and then it is imported."""
    if name in _hidden:
        return _hidden[name]
    if _find(name) is None:
        return "is not installed"
    if name == "apex" and (problem := _apex_problem()):
        return problem
    try:
        importlib.import_module(name)
        if name == _TRANSFORMER_ENGINE:
            importlib.import_module(f"{name}.pytorch")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"is installed but does not import ({type(error).__name__}: {reason})"
    return None


def _apex_problem() -> str | None:
    """Why the `apex` that Python would import is not a usable NVIDIA Apex; runs none of its code."""
    folders = [Path(folder) for folder in _find("apex").submodule_search_locations or []]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "is a package of this name that is not NVIDIA Apex"
    if _find("amp_C") is None:
        return "is NVIDIA Apex without its CUDA extensions (amp_C)"
    return None


def _find(name: str) -> ModuleSpec | None:
    """The spec of a top-level package; None when there is none or it is hidden."""
    try:
        return find_spec(name)
    except ValueError:  # put into sys.modules by hand, without a spec
        return None
