"""Speed against the usual alternatives, a plain torch loop and torchvision's input pipeline, timed in one process."""
