"""Speed beside the usual alternative: a plain torch loop, torchvision's input pipeline; both timed in one process."""
