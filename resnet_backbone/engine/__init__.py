"""The one training loop and everything around it: configuration, hooks, launch, checks before the first iteration."""

try:
    import detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # it is here, but something that it needs is not
        raise
    raise ImportError(
        "resnet_backbone's training and detection need Detectron2 0.6, which is not installed here. "
        "Install it with: python tools/install_detectron2.py"
    ) from error
