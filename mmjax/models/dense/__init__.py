"""Dense prediction on image encoders: segmentation."""
