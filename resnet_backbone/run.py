"""Run a Detectron2 script, unchanged, with this package's configuration keys, backbones and heads.

The keys join Detectron2's defaults, so that every `get_cfg()` of the script has them. The script runs as `__main__` in
this module's namespace: a process that it spawns imports its parent's main module by name, and so comes here first.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path
from types import CodeType

from resnet_backbone.errors import EXIT_BAD_INPUT

# The script, for spawned processes: while they import the main module, sys.argv[0] is that module's file.
_SCRIPT = "RESNET_BACKBONE_RUN_SCRIPT"


def _prepare() -> CodeType:
    """Register everything, set what Python sets for a script, and return the script's code."""
    if __name__ == "__main__":
        parser = argparse.ArgumentParser("python -m resnet_backbone.run", description=__doc__.partition("\n")[0])
        parser.add_argument("script", metavar="SCRIPT", help="for example Detectron2's tools/train_net.py")
        parser.add_argument("words", nargs=argparse.REMAINDER, metavar="…", help="the script's own arguments")
        given = parser.parse_args()
        sys.argv = [given.script, *given.words]
        if not os.path.isfile(given.script):
            folder = Path(given.script).parent
            near = difflib.get_close_matches(given.script, map(str, folder.glob("*.py")), n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]}" if near else f"{folder} has no .py file"
            print(f"error: there is no script {given.script}; {hint}.", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)
        os.environ[_SCRIPT] = given.script
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(given.script))
    else:
        sys.argv[0] = os.environ[_SCRIPT]

    from resnet_backbone.detection.config import add_to_defaults

    add_to_defaults()
    file = os.path.abspath(sys.argv[0])
    code = compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)
    for name in [name for name in globals() if not name.startswith("__")]:
        del globals()[name]  # a script starts with an empty namespace
    globals().update(__file__=file, __doc__=None)
    return code


if __name__ in ("__main__", "__mp_main__"):  # the latter in a spawned process
    exec(_prepare(), globals())
