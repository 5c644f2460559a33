"""Let `import torchvision` work beside a CPU-only torch.

The wheel of torchvision is built for CUDA. Where its compiled operators cannot load, its own Python code still
registers fakes for two of them and fails. This module defines those two schemas first, once, when something
imports torchvision; an installation whose operators load is left as it is.
"""
import importlib.abc
import importlib.util
import sys
import warnings
from pathlib import Path

_ARGS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_SCHEMAS = ("nms" + _ARGS, "qnms" + _ARGS)
_library = None  # a torch.library.Library unregisters its operators when it is collected: keep it


def ensure_torchvision_ops() -> str | None:
    "`native` if torchvision's operators load, `shim` if their schemas were defined here, None without torchvision."
    global _library
    if _library is not None: return "shim"
    spec = importlib.util.find_spec("torchvision")
    if spec is None: return None
    import torch
    if torch._C._dispatch_has_kernel("torchvision::nms"): return "native"
    root = Path(spec.submodule_search_locations[0])
    for compiled in [*root.glob("_C*.so"), *root.glob("_C*.pyd")]:
        try: torch.ops.load_library(str(compiled))
        except OSError: continue
        return "native"
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS: _library.define(schema)
    return "shim"


class _Finder(importlib.abc.MetaPathFinder):
    "Steps aside on the first `import torchvision`, after looking at its operators."
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            try: ensure_torchvision_ops()
            except (ImportError, RuntimeError, AttributeError) as error:
                warnings.warn(f"torchvision's operators could not be looked at: {error!r}")
        return None


def install():
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
