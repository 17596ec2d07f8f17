"""The ResNet paper's central claim on CIFAR-10: plain networks degrade with depth, residual ones do not."""
