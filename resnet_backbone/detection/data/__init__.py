"""Detection data: data sets by name or file, and training batches for Detectron2's models."""
