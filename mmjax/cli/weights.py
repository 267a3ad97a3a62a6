"""The verbs about weights: convert, models."""

import rich
from rich.table import Table

from mmjax import hub
from mmjax.cli.loading import load
from mmjax.errors import MmjaxError
from mmjax.hub import LossyExport
from mmjax.models import SYSTEMS

OWN = "mmjax"


def convert(source: str, target: str, layout: str, read_as: str | None = None, lossy: bool = False) -> None:
    """Writes a model in another layout.

    lossy: write it even if the layout cannot hold all of the model, and print what it cannot hold.
    Raises MmjaxError: such a loss without `lossy`.
    """
    model = load(source, layout=read_as)
    losses: tuple[str, ...] = ()
    if layout == OWN:
        hub.save(model, target)
    else:
        try:
            losses = hub.export(model, target, layout=layout, lossy=lossy)
        except LossyExport as error:
            hint = "--lossy writes it nevertheless: mmjax reads everything back, other programs do not"
            raise MmjaxError(f"{error}. {hint}") from None
    for loss in losses:
        print(f"not in the layout {layout}, for mmjax alone in config.json or labels.json: {loss}")
    print(f"{model.system}: {source} ({model.layout}) -> {target} ({layout})")


def models() -> None:
    table = Table(title="systems", title_justify="left")
    for column in ("system", "layouts of its weights", "what it is"):
        table.add_column(column)
    for system in SYSTEMS:
        about = (system.model.__doc__ or "").strip().splitlines()
        layouts = ", ".join([*(layout.name for layout in system.layouts), OWN])
        table.add_row(system.name, layouts, about[0] if about else "")
    rich.print(table)
