"""Pairs of emoji names: no held-out pair is trained on, whatever the language."""

import pytest

from mmjax.data.emoji_names import load_emoji_names
from mmjax.errors import MmjaxError

pytest.importorskip("emoji")


@pytest.mark.parametrize(("language", "pair"), [("de", ("deer", "hirsch")), ("fr", ("deer", "cerf"))])
def test_no_held_out_name_is_trained_on(language, pair):
    names = load_emoji_names(language)
    trained, held_out = {english for english, _ in names.train}, [english for english, _ in names.held_out]
    assert len(held_out) == len(set(held_out)) and not trained & set(held_out)
    assert pair in names.train + names.held_out
    assert 0.15 < len(held_out) / (len(held_out) + len({other for _, other in names.train})) < 0.25
    texts = [text for names_of_pair in (*names.train, *names.held_out) for text in names_of_pair]
    assert all(text and text == text.lower() and not set(":_") & {text[0], text[-1]} for text in texts)
    assert not any("skin tone" in english for english in trained)


def test_the_split_does_not_depend_on_the_language():
    german, french = ({english for english, _ in load_emoji_names(code).held_out} for code in ("de", "fr"))
    assert german == french


def test_an_unknown_language_is_refused():
    with pytest.raises(MmjaxError, match="language='tlh': the names of emoji are there in ar, de"):
        load_emoji_names("tlh")
