"""curves.png: which metrics are on the page, in which order, and how each is drawn."""

import io

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from mmjax.training import curves


def lines(steps=40):
    log = []
    for step in range(1, steps + 1):
        log.append({"step": step, "train/accuracy": step / steps, "train/loss": 5 - step / steps, "train/flat": 0.3})
        if step % 10 == 0:
            scores = {f"val/R@{k}": k + step / 10 for k in (1, 5, 10)}
            scores |= {f"val/R@{k}_low": 0.0 for k in (1, 5, 10)} | {"val/R@1_high": 3 + step / 10}
            log.append(
                {"step": step}
                | scores
                | {"val/R@1_chance": 0.5, "val/R_n": 740, "val/zero_shot_top1": step, "val/zero_shot_top5": step + 1}
            )
    log.append({"step": steps, "val/once": 3.0})
    return log


def test_loss_first_then_scores_then_training_without_constants_and_single_points():
    panels = curves.choose_panels(curves.points_of(lines()))
    assert panels == {
        "train/loss": ["train/loss"],
        "val/R": ["val/R@1", "val/R@5", "val/R@10"],
        "val/zero_shot": ["val/zero_shot_top1", "val/zero_shot_top5"],
        "train/accuracy": ["train/accuracy"],
    }
    many = [{"step": step} | {f"val/score_{letter}": step for letter in "abcdefghijklm"} for step in (1, 2)]
    assert len(curves.choose_panels(curves.points_of(many))) == curves.PANELS


def test_a_page_has_labels_bands_chance_and_smooth_lines(monkeypatch):
    recorded = []
    for method in ("plot", "fill_between", "axhline", "set_ylabel", "set_xlabel"):
        original = getattr(matplotlib.axes.Axes, method)

        def record(axes, *args, method=method, original=original, **kwargs):
            recorded.append((method, args, kwargs))
            return original(axes, *args, **kwargs)

        monkeypatch.setattr(matplotlib.axes.Axes, method, record)
    page = curves.draw(lines(), {"val/R@1": "%", "val/zero_shot_top1": "%"}, "run $1")
    image = Image.open(io.BytesIO(page))
    assert image.format == "PNG" and image.width > 1000 and image.height < 1.2 * image.width
    calls = {name: [(args, kwargs) for method, args, kwargs in recorded if method == name] for name, _, _ in recorded}
    assert [args[0] for args, _ in calls["set_ylabel"]] == ["loss", "%", "%", "accuracy"]
    assert {args[0] for args, _ in calls["set_xlabel"]} == {"step"}
    assert [args[0] for args, _ in calls["axhline"]] == [0.5] and calls["axhline"][0][1]["linestyle"] == "--"
    (((steps, low, high), _),) = calls["fill_between"]  # R@1 alone has both ends
    assert (list(steps), list(low), list(high)) == ([10, 20, 30, 40], [0, 0, 0, 0], [4, 5, 6, 7])
    faint = [kwargs["alpha"] for _, kwargs in calls["plot"] if "alpha" in kwargs]
    assert len(faint) == 2  # loss and accuracy; four points of a score are drawn as they are
    labels = [kwargs.get("label") for _, kwargs in calls["plot"]]
    assert {"R@1", "R@5", "R@10", "chance"} <= set(labels)


@pytest.mark.parametrize("n", [12, 13, 400])
def test_the_smooth_line_follows_without_lag_and_reaches_both_ends(n):
    noise = np.random.default_rng(0).standard_normal(n)
    assert curves.smooth(noise).shape == (n,)
    np.testing.assert_allclose(curves.smooth(np.full(n, 5.0)), 5)
    np.testing.assert_allclose(curves.smooth(np.arange(n))[n // 3 : -n // 3], np.arange(n)[n // 3 : -n // 3], atol=0.02)
    if n == 400:
        assert np.std(curves.smooth(noise)) < 0.3 * np.std(noise)


def test_nothing_to_draw():
    assert curves.draw([], {}) is None
    assert curves.draw([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/flat": None}], {}) is None
