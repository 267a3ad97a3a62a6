"""The held-out split: by a record's name, independent of the other records."""

import hashlib


def is_held_out(name: str, share: float) -> bool:
    """Whether the name's hash falls in the lowest `share`, from 0 to 1."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
