"""Complaints of networks and transforms, which know no configuration, put as complaints about its keys."""

import contextlib
from collections.abc import Iterator

from resnet_backbone.engine.config import ConfigError


@contextlib.contextmanager
def as_config_error(keys: str) -> Iterator[None]:
    """Turn a ValueError into a ConfigError that names the keys its values came from."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{keys}: {error}.") from error
