"""The ResNet paper's comparison of VGG-16 and ResNet-101 as Faster R-CNN backbones, at four scales."""
