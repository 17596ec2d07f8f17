"""Triton's kernels without a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpret(tmp_path_factory) -> Callable[[list[tuple[str, str, tuple]]], list[Any]]:
    """The function that makes calls (module in ops, function, arguments) in Triton's interpreter."""
    pytest.importorskip("triton")

    def run(calls: list[tuple[str, str, tuple]]) -> list[Any]:
        folder = tmp_path_factory.mktemp("interpreted")
        torch.save(calls, folder / "calls")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, HERE / "interpreted.py", folder / "calls", folder / "results"]
        done = subprocess.run(words, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(folder / "results", weights_only=True)

    return run


@pytest.fixture(scope="session")
def compile_kernel(tmp_path_factory) -> Callable[..., tuple[str, dict[str, int]]]:
    """The function that compiles a kernel for an H100 and returns its PTX and what it needs, by name, as REG or LOCAL.

    Arguments: the kernel, its constants, the types of other arguments but for int32, the names of those that are
    divisible by 16, and the number of warps.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def run(kernel, constants, types, aligned, *, warps):
        names = kernel.arg_names
        constants = {name: value for name, value in constants.items() if name in names}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
        source = ASTSource(kernel, signature, constants, divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        file = tmp_path_factory.mktemp("compiled") / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        return compiled.asm["ptx"], {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", said)}

    return run
