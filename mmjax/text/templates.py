"""Prompt templates for zero-shot classification: sentences with a {} for the label (CLIP, section 3.1.4).

`mmjax.evaluation.zero_shot` has more templates and the function that fills them, `prompts`.
"""

PHOTOS = (
    "a photo of a {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a black and white photo of the {}.",
    "a photo of many {}.",
    "a bright photo of the {}.",
    "a dark photo of the {}.",
    "a cropped photo of a {}.",
)
"""Photographs under changing conditions."""

RENDITIONS = (
    "a drawing of a {}.",
    "a painting of the {}.",
    "a sketch of a {}.",
    "a cartoon {}.",
    "an icon of a {}.",
    "a toy {}.",
    "a sculpture of the {}.",
)
"""Everything that is not a photograph."""
