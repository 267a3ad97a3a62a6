"""Prompt templates for zero-shot classification: sentences with a place for the label (CLIP, section 3.1.4).

More in `mmjax.evaluation.zero_shot`, with the function that fills them; any tuple of strings with one {} each will do.
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
