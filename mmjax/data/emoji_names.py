"""The names of emoji in two languages, as pairs to translate: from the package `emoji`.

    names = load_emoji_names("de")
    names.train[0]    # ("1st place medal", "goldmedaille")

These rules determine the pairs, and the split:
  1. Every emoji with both names, one pair an English name; skin-tone variants are dropped. All is lower case.
  2. An English name is held out if its hash falls in the lowest fifth.
  3. Aliases of a trained name are further English sides of its pair, but for those that are held-out names.
"""

from dataclasses import dataclass

from mmjax.data.splits import is_held_out
from mmjax.errors import MmjaxError

HELD_OUT_SHARE = 0.2
SKIN_TONES = range(0x1F3FB, 0x1F400)
Pair = tuple[str, str]


@dataclass(frozen=True)
class EmojiNames:
    """(English, the other language) each; no English text of `train` is one of `held_out`."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def load_emoji_names(language: str = "de") -> EmojiNames:
    """Raises MmjaxError when the package is missing (`pip install "mmjax[demo]"`) or does not know the language."""
    try:
        import emoji
    except ImportError as error:
        raise MmjaxError(f'emoji names need the package {error.name}: pip install "mmjax[demo]"') from error
    known = sorted(set(emoji.LANGUAGES) - {"en", "alias"})
    if language not in known:
        raise MmjaxError(f"language={language!r}: the names of emoji are there in {', '.join(known)}")
    emoji.config.load_language(language)
    pairs: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    for character, fields in emoji.EMOJI_DATA.items():
        if language not in fields or any(ord(c) in SKIN_TONES for c in character):
            continue
        name = _words(fields["en"])
        pairs.setdefault(name, _words(fields[language]))
        aliases.setdefault(name, []).extend(_words(alias) for alias in fields.get("alias", ()))
    held_out = {name for name in pairs if is_held_out(name, HELD_OUT_SHARE)}
    train: dict[Pair, None] = {}
    for name in (name for name in pairs if name not in held_out):
        texts = (name, *(alias for alias in aliases[name] if alias not in held_out))
        train |= {(text, pairs[name]): None for text in texts}
    return EmojiNames(tuple(train), tuple((name, pairs[name]) for name in pairs if name in held_out))


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ").lower()
