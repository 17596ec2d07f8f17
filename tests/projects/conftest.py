import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def run(request, load_script):
    """`run.py` of the project that the module's PROJECT names, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.module.PROJECT)  # as Python does, for the processes that it starts too
        yield load_script(request.module.PROJECT / "run.py")


@pytest.fixture(scope="module")
def project(request, run) -> dict[str, ModuleType]:
    """The modules of the project's package by name."""
    package = f"{request.module.PROJECT.name}."
    return {name.removeprefix(package): module for name, module in sys.modules.items() if name.startswith(package)}
