"""The verbs about weights: convert, models."""

import rich
from rich.table import Table

from mmjax import hub
from mmjax.models import SYSTEMS

OWN = "mmjax"


def convert(source: str, target: str, layout: str, read_as: str | None = None) -> None:
    model = hub.load(source, layout=read_as)
    if layout == OWN:
        hub.save(model, target)
    else:
        hub.export(model, target, layout=layout)
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
