"""The shared training loop and everything around it: configuration, hooks, launching and up-front checks."""

import warnings

try:
    with warnings.catch_warnings():
        # Detectron2 0.6 and fvcore use TorchScript when they are imported, of which torch 2.14 warns.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated")
        import detectron2.engine
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # installed, but one of its own dependencies is missing
        raise
    raise ImportError(
        "resnet_backbone's training and detection need Detectron2 0.6, which is not installed here. "
        "Install it with: resnet-backbone-install-detectron2"
    ) from error
