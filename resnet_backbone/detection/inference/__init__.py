"""Trained detectors in use: in a script, and on folders of images and videos."""
