"""The learning curve: the same bytes for the same results, and every split in it."""

import io
import re

import numpy as np
from PIL import Image
from tiny_zoo import records

from hf_zoo.hub.figures import draw_learning_curve, shows


def test_the_picture_has_the_same_bytes_for_the_same_results():
    results = records(5)
    picture = draw_learning_curve(results)
    assert picture == draw_learning_curve(list(results))
    assert picture != draw_learning_curve(records(4))
    assert shows(picture, results)
    assert not shows(picture, records(4))
    # No date, no version of the drawing library.
    assert b"Matplotlib" not in picture
    assert b"tIME" not in picture
    assert not re.search(rb"20\d\d-\d\d-\d\d", picture)


def test_the_picture_shows_every_split():
    def colours(results):
        pixels = np.array(Image.open(io.BytesIO(draw_learning_curve(results))).convert("RGB")).reshape(-1, 3)
        return {tuple(int(value) for value in pixel) for pixel in np.unique(pixels, axis=0)}

    train, validation, test = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)
    assert {train, validation, test} <= colours(records(5))
    without = [{k: v for k, v in record.items() if not k.startswith("test_")} for record in records(5)]
    assert test not in colours(without)
