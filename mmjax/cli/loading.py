"""Loading a model for a verb: what was assumed about it is printed to stderr."""

import sys
from typing import Any

from mmjax import hub


def load(source: str, **options: Any) -> Any:
    """`hub.load`, and a line on stderr for each of the model's notes. options: keywords of `hub.load`."""
    model = hub.load(source, **options)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    return model
