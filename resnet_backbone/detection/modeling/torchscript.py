"""What `accelerate` has changed, in TorchScript: traced as Detectron2's own modules, and never scripted.

A trace runs no Python: sizes that the faster modules compute in Python would be those of the traced image for all
others, and their operators exist in this package alone.
"""

from typing import NoReturn

from resnet_backbone.errors import InputError


class NotScripted:
    """Mixin of the modules that `accelerate` puts in place of others."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which calls this first, instead of its failing somewhere inside."""
        raise InputError(
            f"torch.jit.script got a {type(self).__name__}, one of the modules that accelerate puts in place of "
            "others; it compiles Detectron2's own. Script the model before accelerate, or trace it, which works after "
            "it, too."
        )
