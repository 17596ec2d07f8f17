"""Run Triton's kernels on a CPU, by Triton's interpreter: `TRITON_INTERPRET=1 python interpreted.py CALLS RESULTS`.

CALLS holds a list of (module in resnet_backbone.ops, function, arguments); RESULTS gets what they return. The variable
must be set before anything imports Triton, hence a process of its own.
"""

import importlib
import sys

import torch
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_for_numpy(tensor, scope) -> None:
    """As in Triton, but for `range` with a bound known at run time: NumPy 2.4 takes no array of one for a number."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_for_numpy

if __name__ == "__main__":
    calls, results = sys.argv[1:]
    found = []
    for module, function, arguments in torch.load(calls, weights_only=True):
        call = getattr(importlib.import_module(f"resnet_backbone.ops.{module}"), function)
        found.append(call(*arguments))
    torch.save(found, results)
