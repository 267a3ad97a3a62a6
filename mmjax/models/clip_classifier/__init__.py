"""CLIP's image tower with a head of classes: what is left of a CLIP that was fine-tuned on labelled images."""
