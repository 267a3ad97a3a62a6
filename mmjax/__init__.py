"""mmjax: the vision-language lineage in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmjax.hub import export as export
    from mmjax.hub import load as load
    from mmjax.hub import save as save

__version__ = "0.1.0"

__all__ = ["export", "load", "save"]


def __getattr__(name: str) -> Any:
    # The hub imports jax, which takes a second; data workers and `mmjax --help` need neither.
    if name in __all__:
        from mmjax import hub

        return getattr(hub, name)
    raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
