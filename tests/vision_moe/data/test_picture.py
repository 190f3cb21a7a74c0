"""What becomes of pictures that are no upright 8-bit RGB."""

import numpy as np
import pytest
from PIL import Image

from vision_moe.data.picture import RefusedPictureError, decode


def test_exif_orientation_turns_the_picture_upright(encode):
    image = Image.new("RGB", (2, 1), "blue")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    # 6: the camera was held so that the picture must be turned by 90 degrees clockwise.
    exif[0x0112] = 6
    upright = decode(encode(image, exif=exif))
    assert upright.size == (1, 2)
    assert [upright.getpixel((0, y)) for y in range(2)] == [(255, 0, 0), (0, 0, 255)]


def test_transparency_shows_white_and_half_of_it_half(encode):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert [decode(encode(image)).getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (200, 0, 0), (127, 127, 127)]


def test_transparent_color_of_a_palette_is_white(encode):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putpixel((1, 0), 1)
    rgb = decode(encode(image, transparency=1))
    assert [rgb.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


def test_sixteen_bits_are_scaled_and_not_cut_to_white(encode):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    encoded = encode(Image.fromarray(values))
    rgb = decode(encoded)
    # 257 = 65535 / 255
    assert [rgb.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


def test_cmyk_grey_and_one_bit_become_rgb(encode):
    # No ink is white, full cyan takes the red away.
    cmyk = decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))
    red, green, blue = cmyk.getpixel((4, 4))
    assert red < 10
    assert min(green, blue) > 245
    assert decode(encode(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert decode(encode(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(encode, form):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    animation = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decode(animation).getpixel((1, 1)) == (255, 0, 0)


def test_a_small_file_of_many_pixels_is_refused_before_it_is_unpacked(encode):
    encoded = encode(Image.new("1", (3000, 2000)))
    assert len(encoded) < 10_000
    with pytest.raises(RefusedPictureError, match=r"3000 x 2000 pixels; at most 5999999"):
        decode(encoded, max_pixels=5_999_999)
    assert decode(encoded, max_pixels=6_000_000).size == (3000, 2000)


def test_a_thread_of_pixels_is_refused(encode):
    with pytest.raises(RefusedPictureError, match="1 x 101 pixels"):
        decode(encode(Image.new("RGB", (1, 101))))
    assert decode(encode(Image.new("RGB", (1, 100)))).size == (1, 100)


def test_floating_point_pictures_are_refused(encode):
    with pytest.raises(RefusedPictureError, match="mode F"):
        decode(encode(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_every_cut_of_a_jpeg_is_an_os_error_or_a_picture(encode):
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    for length in range(0, len(whole) - 2, 97):
        with pytest.raises(OSError, match=r"."):
            decode(whole[:length])


def test_flipped_bytes_give_a_picture_or_an_os_error(encode):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.effect_noise((32, 32), 50)
    originals = [
        encode(image, "JPEG", exif=exif),
        encode(image, exif=exif),
        encode(image, "GIF"),
        encode(image, "TIFF"),
    ]
    errors = 0
    for turn in range(400):
        damaged = bytearray(originals[turn % 4])
        for place in rng.integers(len(damaged), size=8):
            damaged[place] = int(rng.integers(256))
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except OSError:
            errors += 1
    assert 0 < errors < 400
