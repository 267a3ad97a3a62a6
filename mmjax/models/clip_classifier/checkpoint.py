"""No public layout has an image tower with a head on its pooled vector; mmjax's own does."""

from mmjax.weights.table import Layout

LAYOUTS: tuple[Layout, ...] = ()
