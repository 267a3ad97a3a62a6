"""Vision Transformer: the original, DeiT, DINOv2 and the hybrids with a ResNet root."""
