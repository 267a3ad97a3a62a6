"""Dense prediction on image encoders: segmentation and detection."""
