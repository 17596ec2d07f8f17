"""Fast operators, each beside the plain PyTorch function that defines it."""

from resnet_backbone.ops.frozen_bn import affine, convolve_and_normalize
from resnet_backbone.ops.matching import match
from resnet_backbone.ops.nms import batched_nms, nms
from resnet_backbone.ops.roi_align import roi_align
from resnet_backbone.ops.roi_pool import roi_pool
from resnet_backbone.ops.sampling import sample
