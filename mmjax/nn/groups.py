"""Groups of the global batch: the rows that one process of an original run saw together, on however many devices.

A group is a number in the recipe, not a device: "64 pairs a process" means the same thing on one chip and on 256. The
global batch is cut, in order, into equal groups. Under a mapped axis a device holds several whole groups, or several
devices share one; rows of other devices are gathered with their gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.errors import MmjaxError
from mmjax.types import Array, Int


class Cut(NamedTuple):
    """The layout of groups on devices; one of `local` and `together` is 1.

    Attributes:
        local: groups that have rows on a device.
        together: devices that share a group.
        members: the devices of each group, for `axis_index_groups`; None where that is each by itself, or all.
    """

    local: int
    together: int
    members: tuple[tuple[int, ...], ...] | None


def cut(rows: int, groups: int, axis_name: str | None = None) -> Cut:
    """Cuts a global batch of which a device has `rows` rows.

    Raises MmjaxError if the groups do not cut the global batch, or do not fit the devices.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if groups < 1 or (groups % devices and devices % groups) or (rows * devices) % groups:
        raise MmjaxError(
            f"groups={groups} does not cut a global batch of {rows * devices} on {devices} devices: groups are "
            "equal parts of the batch, and either whole parts of a device or made of whole devices"
        )
    local, together = max(groups // devices, 1), max(devices // groups, 1)
    members = None
    if 1 < together < devices:
        members = tuple(tuple(range(first, first + together)) for first in range(0, devices, together))
    return Cut(local, together, members)


def group_rows(x: Array, groups: int = 1, axis_name: str | None = None) -> Array:
    """[b, ...] -> [local, m, ...]: all m rows of each group that has rows on this device. Raises as `cut` does."""
    local, together, members = cut(len(x), groups, axis_name)
    if axis_name is not None and together > 1:
        x = lax.all_gather(x, axis_name, axis_index_groups=members, tiled=True)
    return x.reshape(local, -1, *x.shape[1:])


def group_positions(rows: int, groups: int = 1, axis_name: str | None = None) -> Int[Array, "b"]:
    """The position of each of this device's rows among the rows of its group, from 0. Raises as `cut` does."""
    local, together, _ = cut(rows, groups, axis_name)
    first = 0 if axis_name is None else lax.axis_index(axis_name) % together * rows
    return jnp.tile(first + jnp.arange(rows // local), local)


def take_in_group(x: Array, positions: Int[Array, "b"], groups: int = 1, axis_name: str | None = None) -> Array:
    """[b, ...] -> [b, ...]: for each row the row of its group at `positions`. A negative position counts from the end.

    Raises as `cut` does.
    """
    rows = group_rows(x, groups, axis_name)
    taken = jax.vmap(lambda rows, positions: rows[positions])(rows, positions.reshape(len(rows), -1))
    return taken.reshape(x.shape)


def group_totals(x: Array, groups: int = 1, axis_name: str | None = None) -> Array:
    """[b, ...] -> [b, ...]: for each row the sum over the rows of its group. Raises as `cut` does."""
    totals = jnp.sum(group_rows(x, groups, axis_name), axis=1, keepdims=True)
    return jnp.broadcast_to(totals, (len(totals), len(x) // len(totals), *x.shape[1:])).reshape(x.shape)
