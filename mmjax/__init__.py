"""mmjax: the vision-language lineage in JAX."""

__version__ = "0.1.0"
