"""The one error type of the library; free of jax, so that data workers may raise it."""


class MmjaxError(ValueError):
    """Bad input. One message names the file, key or argument; nothing was changed."""
