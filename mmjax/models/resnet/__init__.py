"""ResNet (arXiv 1512.03385) and its relatives: ResNeXt, wide nets, the CIFAR family, plain nets without shortcuts."""
