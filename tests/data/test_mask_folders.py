"""Folders of images and masks: pairs, splits, the common transforms, and what a bad mask does."""

import numpy as np
import pytest
from PIL import Image

from mmjax.data.decoding import BadRecord
from mmjax.data.masks import MaskFolder, RandomCropWithMask, ResizeWithMask, decode_mask, mask_split, palette
from mmjax.data.pipeline import Pipeline, batches
from mmjax.errors import MmjaxError


def write(root, count=10, classes=("sky", "sea"), suffix=".jpg"):
    """Images whose mask is 1 exactly where they are bright: the right half."""
    for name in ("images", "masks"):
        (root / name / "a").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    for i in range(count):
        image = np.full((20 + i, 31, 3), 10, np.uint8)
        image[:, 16:] = 240
        Image.fromarray(image).save(root / "images" / "a" / f"{i}{suffix}", quality=100)
        mask = Image.fromarray((image[..., 0] > 128).astype(np.uint8), "P")
        mask.putpalette(palette(2).tobytes())
        mask.save(root / "masks" / "a" / f"{i}.png")
    return root


def test_pairs_are_found_by_their_path_and_read(tmp_path):
    folder = MaskFolder(write(tmp_path / "photos"))
    assert len(folder) == 10 and folder.classes == ("sky", "sea") and folder.name == "photos"
    record = folder[3]
    assert decode_mask(record["mask"], 2).tolist() == [[0] * 16 + [1] * 15] * 23
    assert folder.record_name(3).endswith("images/a/3.jpg")
    assert MaskFolder(tmp_path / "photos").fingerprint == folder.fingerprint != folder.select([1, 2]).fingerprint


def test_a_share_is_held_out_by_the_paths_alone(tmp_path):
    write(tmp_path)
    train, test = mask_split(tmp_path, 0.25)
    assert test is not None and len(train) == 7 and len(test) == 3
    assert not set(train.pairs) & set(test.pairs)
    again = mask_split(tmp_path, 0.25)[1]
    assert again is not None and again.pairs == test.pairs and mask_split(tmp_path, 0.0)[1] is None


def test_folders_of_training_and_validation(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / name, 3)
    train, test = mask_split(tmp_path, 0.5)
    assert test is not None and (len(train), len(test)) == (3, 3)
    (tmp_path / "val" / "classes.txt").write_text("sea\nsky\n")
    with pytest.raises(MmjaxError, match=r"val/classes\.txt: other classes than"):
        mask_split(tmp_path, 0.5)


@pytest.mark.parametrize("transform", [ResizeWithMask(24, 2), RandomCropWithMask(24, 2, (0.2, 1.0))])
def test_images_and_masks_stay_together(tmp_path, transform):
    pipeline = Pipeline(MaskFolder(write(tmp_path)), 5, transforms=(transform,), epochs=4)
    left = 0
    for batch in batches(pipeline):
        assert batch["image"].shape == (5, 24, 24, 3) and batch["mask"].shape == (5, 24, 24)
        assert batch["image"].dtype == batch["mask"].dtype == np.uint8
        # Up to the column where the two meet, which the image's filter blends.
        differs = (batch["image"][..., 0] > 128) != (batch["mask"] == 1)
        assert differs.any(1).sum(-1).max() <= 2
        left += int(batch["mask"][:, :, 0].any(1).sum())
    assert (left > 0) == isinstance(transform, RandomCropWithMask)  # mirrored ones


def test_masks_are_read_in_one_channel_and_checked(tmp_path):
    def stored(array, mode=None):
        Image.fromarray(array, mode).save(tmp_path / "m.png")
        return (tmp_path / "m.png").read_bytes()

    grey = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)
    np.testing.assert_array_equal(decode_mask(stored(grey), 3), grey)
    np.testing.assert_array_equal(decode_mask(grey, 3), grey)
    np.testing.assert_array_equal(decode_mask(stored(grey.astype(np.uint16)), 3), grey)
    with pytest.raises(BadRecord, match=r"mask: unknown class \(value 2, of 2 classes\)"):
        decode_mask(stored(grey), 2)
    with pytest.raises(BadRecord, match="mask: not one channel"):
        decode_mask(stored(np.zeros((4, 5, 3), np.uint8)), 2)
    record = {"image": np.zeros((4, 5, 3), np.uint8), "mask": np.zeros((5, 4), np.uint8)}
    with pytest.raises(BadRecord, match="mask: another size"):
        ResizeWithMask(24, 2).map(record)


def test_a_bad_mask_is_skipped_and_named(tmp_path):
    write(tmp_path)
    Image.fromarray(np.full((22, 31), 7, np.uint8)).save(tmp_path / "masks" / "a" / "2.png")
    pipeline = Pipeline(MaskFolder(tmp_path), 2, transforms=(ResizeWithMask(24, 2),), epochs=1, max_bad_fraction=0.2)
    iterator = iter(pipeline)
    assert len(list(iterator)) == 5
    assert iterator.bad_counts == {"mask: unknown class": 1} and "a/2.jpg" in iterator.skipped[0]


def test_wrong_folders_are_one_error(tmp_path):
    with pytest.raises(MmjaxError, match=r"no images, no masks, no classes\.txt"):
        MaskFolder(tmp_path)
    write(tmp_path)
    (tmp_path / "masks" / "a" / "4.png").unlink()
    with pytest.raises(MmjaxError, match=r"1 of 10 images have no mask: images/a/4\.jpg"):
        MaskFolder(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(MmjaxError, match="expected 2 to 255 different names"):
        MaskFolder(tmp_path)
    with pytest.raises(MmjaxError, match=r"held_out=1\.5"):
        mask_split(tmp_path, 1.5)


def test_the_palette_is_pascals():
    assert palette(4).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert len({tuple(colour) for colour in palette(256).tolist()}) == 256
