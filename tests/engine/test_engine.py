import subprocess
import sys

import pytest

BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(package: str, code: str) -> str:
    """The last line that `code` leaves on stderr where `package` is not installed."""
    done = subprocess.run([sys.executable, "-c", BLOCK + code, package], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", ["engine", "detection", "pretraining"])
def test_a_missing_detectron2_gives_the_command_that_installs_it(module):
    line = without("detectron2", f"import resnet_backbone.{module}")
    assert "need Detectron2 0.6" in line and "resnet-backbone-install-detectron2" in line


def test_something_else_that_is_missing_is_not_taken_for_detectron2():
    assert without("fvcore", "import resnet_backbone.engine.config") == "ModuleNotFoundError: No module named 'fvcore'"
