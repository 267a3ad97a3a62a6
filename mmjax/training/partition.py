"""Freezing and per-group optimisation: labels of the parameter tree by path."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.types import Params

FROZEN = "frozen"
TRAINABLE = "trainable"


@dataclasses.dataclass(frozen=True)
class Partition:
    """A label for every parameter, by glob over slash paths; parameters without a rule are "trainable".

    Attributes:
        rules: glob -> label, the first match wins (`{"vision/norm/**": "trainable", "vision/**": "frozen"}`). The label
            "frozen" means: no gradient, no optimizer state, no weight decay, bit-identical after any number of steps.
    """

    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def labels(self, params: Params) -> dict[str, str]:
        """Slash path -> label.

        Raises:
            MmjaxError: a rule matches no parameter (a typo would otherwise train what should be frozen).
        """
        flat = tree.flatten(params)
        idle = [glob for glob in self.rules if not any(tree.matches(path, glob) for path in flat)]
        if idle:
            raise MmjaxError(f"partition rules {idle} match no parameter; the tree starts with {sorted(flat)[:8]}")
        return {path: self._label(path) for path in flat}

    def _label(self, path: str) -> str:
        return next((label for glob, label in self.rules.items() if tree.matches(path, glob)), TRAINABLE)

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trainable, frozen): two nested dicts whose `tree.merge` is `params`."""
        labels = self.labels(params)
        frozen, trainable = tree.split(params, [path for path, label in labels.items() if label == FROZEN])
        if not trainable:
            raise MmjaxError(f"partition rules {dict(self.rules)} freeze every parameter: nothing is left to train")
        return trainable, frozen

    def label_tree(self, trainable: Params) -> dict[str, Any]:
        """The labels of a trainable subtree, as the nested dict that `optax.partition` takes."""
        return tree.map_with_path(lambda path, _: self._label(path), trainable)
