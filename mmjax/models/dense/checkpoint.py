"""No public layout: a network for segmentation or detection is saved in our own format alone."""

from mmjax.weights.table import Layout

LAYOUTS: tuple[Layout, ...] = ()
