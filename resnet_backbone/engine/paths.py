"""`~` and environment variables in paths of a configuration."""

import os
import re

from resnet_backbone.errors import InputError

PATH_KEYS = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "TEST.ENSEMBLE",
)


def expand(path: str, what: str) -> str:
    """Expand `~`, `~user`, `$NAME` and `${NAME}`, also after a colon (`~/coco.json:$DATA/images`).

    A path with a scheme, such as `s3://…` or `detectron2://…`, is returned as it is.

    Args:
        what: names the path in messages.

    Raises:
        InputError: a variable is not set, or there is no such user.
    """
    if "://" in path:
        return path

    def variable(match: re.Match) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise InputError(f"{what} is {path}, but the environment variable {name} is not set. Set it.")
        return os.environ[name]

    def home(match: re.Match) -> str:
        if (found := os.path.expanduser(match[0])) == match[0]:
            raise InputError(
                f"{what} is {path}, but there is no home folder {found}. For a name with ~, write ./{found}."
            )
        return found

    path = re.sub(r"(?:(?<=^)|(?<=:))~[^/:]*", home, path)
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", variable, path)
