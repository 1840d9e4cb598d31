"""Each corruption against its closed form, a hand-worked case or another implementation; then what holds for all."""

import colorsys
from itertools import pairwise

import numpy as np
import pytest
from scipy import fft, ndimage

from edgecl.streams import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from edgecl.streams.corruptions import table
from edgecl.streams.corruptions.blur import disk, glass_blur
from edgecl.streams.corruptions.digital import elastic_transform
from edgecl.streams.corruptions.images import Draws, motion_kernel, moved, zoom_matrix
from edgecl.streams.corruptions.spatter import MUD, WATER, edges, equalized
from edgecl.streams.corruptions.textures import TEXTURES, frost_texture
from edgecl.streams.corruptions.weather import plasma
from edgecl_device.errors import InputError

ALL = [*CORRUPTIONS, *EXTRA_CORRUPTIONS]


def pictures(count, seed=0, side=32):
    """Smooth colours with a bright and a dark box: some of every frequency and saturation."""
    generator = np.random.default_rng(seed)
    x = ndimage.gaussian_filter(generator.normal(size=(count, side, side, 3)), (0, 3, 3, 0.5), mode="wrap")
    x = 128 + 45 * x / x.std()
    for image in x:
        for light in (30, 215):
            top, left = generator.integers(2, side - 12, 2)
            image[top : top + 8, left : left + 10] = light + generator.integers(-25, 25, 3)
    return np.clip(x, 0, 255).astype(np.uint8)


def flat(value, count=20):
    return np.full((count, 32, 32, 3), value, np.uint8)


def constants(name, severity):
    return table._ALL[name].constants[severity - 1]


def spot(row, column):
    """One white pixel on black."""
    x = np.zeros((1, 32, 32, 3), np.uint8)
    x[0, row, column] = 255
    return x


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_noise_has_its_spread(severity):
    noise = corrupt(flat(128), "gaussian_noise", severity).astype(float) - 128
    assert noise.std() == pytest.approx(255 * constants("gaussian_noise", severity), rel=0.02)
    assert noise.mean() == pytest.approx(-0.5, abs=0.4)  # bytes are cut off, not rounded


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("value", [64, 128])
def test_shot_noise_follows_poisson(severity, value):
    noisy = corrupt(flat(value), "shot_noise", severity) / 255
    rate = constants("shot_noise", severity)
    assert noisy.var() == pytest.approx(value / 255 / rate, rel=0.05)
    assert noisy.mean() == pytest.approx((value - 0.5) / 255, abs=0.003)


@pytest.mark.parametrize("severity", range(1, 6))
def test_impulse_noise_changes_its_share(severity):
    changed = corrupt(flat(128, 40), "impulse_noise", severity).reshape(-1)
    changed = changed[changed != 128]
    share, amount = len(changed) / (40 * 3072), constants("impulse_noise", severity)
    assert share == pytest.approx(amount, abs=4 * np.sqrt(amount / (40 * 3072)))
    assert set(changed.tolist()) == {0, 255} and (changed == 255).mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("severity", range(1, 6))
def test_speckle_noise_grows_with_the_value(severity):
    share = constants("speckle_noise", severity)
    for value in (40, 120):
        assert corrupt(flat(value), "speckle_noise", severity).std() == pytest.approx(value * share, rel=0.04)


# --- blur ------------------------------------------------------------------------------------------------------------


def test_the_widest_defocus_is_a_mean_of_nine():
    assert disk(1.5, 0.1)[3:6, 3:6] == pytest.approx(np.full((3, 3), 1 / 9))
    x = pictures(1)
    wide = np.pad(x[0].astype(float), ((1, 1), (1, 1), (0, 0)), mode="reflect")  # edges mirrored without the border twice
    means = sum(wide[i : i + 32, j : j + 32] for i in range(3) for j in range(3)) / 9
    assert np.abs(corrupt(x, "defocus_blur", 5)[0] - np.floor(means + 1e-9)).max() <= 1


@pytest.mark.parametrize("severity", range(1, 6))
def test_disks(severity):
    radius, rim = constants("defocus_blur", severity)
    kernel = disk(radius, rim)
    assert kernel.sum() == pytest.approx(1) and (kernel >= 0).all()
    assert kernel == pytest.approx(kernel.T) and kernel == pytest.approx(kernel[::-1])
    assert kernel[4, 4] == pytest.approx(kernel.max())
    rows, columns = np.nonzero(kernel > 1e-12)
    assert np.hypot(rows - 4, columns - 4).max() <= radius + np.sqrt(2) + 1e-9
    response = corrupt(spot(15, 17), "defocus_blur", severity)[0, 11:20, 13:22, 0] / 255
    assert np.abs(response - kernel).max() <= 1 / 255


@pytest.mark.parametrize("severity", [1, 5])
def test_gaussian_blur_is_the_sum_over_a_window(severity):
    x, sigma = pictures(1), constants("gaussian_blur", severity)
    reach = int(4 * sigma + 0.5)
    weights = np.array([np.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)])
    weights /= weights.sum()
    expected = np.zeros((32, 32, 3))
    for row in range(32):
        for column in range(32):
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    pixel = x[0, min(max(row + i, 0), 31), min(max(column + j, 0), 31)]
                    expected[row, column] += weights[i + reach] * weights[j + reach] * pixel
    assert np.abs(corrupt(x, "gaussian_blur", severity)[0] - np.floor(expected)).max() <= 1


@pytest.mark.parametrize("times", [1, 2])
def test_glass_blur_overwrites_from_the_last_pixel_on(times):
    x = pictures(3)
    made = glass_blur(x, (0.05, times), Draws([0], range(3)))  # so narrow a Gaussian is one pixel
    draws = Draws([0], range(3))
    expected = (x / 255 * 255).astype(np.uint8)
    for _ in range(times):
        moves = draws.integers(0, 2, (2, 30, 30))
        for image, (up, left) in zip(expected, moves, strict=True):
            for row in range(31, 1, -1):
                for column in range(31, 1, -1):
                    image[row, column] = image[row - up[row - 2, column - 2], column - left[row - 2, column - 2]]
    assert np.array_equal(made, (expected / 255 * 255).astype(np.uint8))


def test_motion_kernels():
    for radius, sigma in table.COMMON["motion_blur"].constants:
        kernel = motion_kernel(radius, sigma)
        assert len(kernel) == 2 * radius + 1 and kernel.sum() == pytest.approx(1)
        assert kernel[2] / kernel[0] == pytest.approx(np.exp(-2 / sigma**2)) and (np.diff(kernel) < 0).all()


@pytest.mark.parametrize(("degrees", "step"), [(0, (0, -1)), (90, (-1, 0)), (-90, (1, 0)), (45, (-1, -1)), (-45, (1, -1))])
def test_motion_leaves_a_trail_behind_a_spot(degrees, step):
    """The pixel at distance k along the angle counts with weight k: a spot lights the places from which it is seen."""
    blurred = moved(spot(16, 15), 8, 2.0, np.array([float(degrees)]))[0, :, :, 1]
    expected = np.zeros((32, 32))
    for k, weight in enumerate(motion_kernel(8, 2.0)):
        # Along a diagonal, steps of whole pixels are nearest to k cos 45.
        far = k if degrees % 90 == 0 else int(np.ceil(k * np.sqrt(0.5) - 0.5))
        row, column = 16 + far * step[0], 15 + far * step[1]
        if 0 <= row < 32 and 0 <= column < 32:
            expected[row, column] += 255 * weight
    assert np.abs(blurred - expected).max() <= 0.5 + 1e-9


def test_motion_blur_keeps_to_the_horizontal():
    trails = corrupt(np.repeat(spot(16, 20), 50, axis=0), "motion_blur", 5)[:, :, :, 0] > 0
    rows, columns = trails.any(axis=2).sum(axis=1), trails.any(axis=1).sum(axis=1)
    assert (rows <= columns).all() and rows.max() > 3 and rows.min() == 1  # angles vary, up to 45 degrees


@pytest.mark.parametrize("size", [32, 33, 48])
def test_zooms_are_scipys(size):
    image = np.random.default_rng(0).uniform(size=(size, size))
    for factor in (1.0, 1.01, 1.13, 1.25, 1.75, 2.25):
        inner = int(np.ceil(size / factor))
        first = (size - inner) // 2
        wide = ndimage.zoom(image[first : first + inner, first : first + inner], factor, order=1, mode="nearest")
        start = (len(wide) - size) // 2
        made = zoom_matrix(size, factor) @ image @ zoom_matrix(size, factor).T
        assert made == pytest.approx(wide[start : start + size, start : start + size], abs=1e-9)
    assert np.array_equal(zoom_matrix(size, 1.0), np.eye(size))


def test_zoom_blur_is_a_mean_of_zooms():
    x = pictures(1)
    factors = [1 + k / 100 for k in range(6)]  # below 1.06; NumPy's range of floats decides about the end
    factors += [1.06] if len(np.arange(1, 1.06, 0.01)) == 7 else []
    zooms = [np.einsum("ij,jkc,lk->ilc", zoom_matrix(32, f), x[0] / 255, zoom_matrix(32, f)) for f in factors]
    expected = (x[0] / 255 + sum(zooms)) / (len(zooms) + 1) * 255
    assert np.abs(corrupt(x, "zoom_blur", 1)[0] - np.floor(expected)).max() <= 1


# --- weather ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "decay"), [(4, 3.0), (8, 1.75), (32, 2.0)])
def test_plasma_is_diamonds_and_squares(size, decay):
    noise = np.random.default_rng(1).uniform(-1, 1, (2, size * size - 1))
    made = plasma(noise, size, decay)
    for image, numbers in zip(made, noise.tolist(), strict=True):
        heights, rest = np.zeros((size, size)), iter(numbers)
        step, height = size, 100.0
        while step > 1:
            half = step // 2
            rounds = [  # first place, and where the four neighbours lie
                ((half, half), [(-half, -half), (-half, half), (half, -half), (half, half)]),
                ((0, half), [(-half, 0), (half, 0), (0, -half), (0, half)]),
                ((half, 0), [(-half, 0), (half, 0), (0, -half), (0, half)]),
            ]
            for (top, left), around in rounds:
                for row in range(top, size, step):
                    for column in range(left, size, step):
                        mean = sum(heights[(row + i) % size, (column + j) % size] for i, j in around) / 4
                        heights[row, column] = mean + height**2 * next(rest)
            step, height = half, height / decay
        assert next(rest, None) is None
        assert image == pytest.approx((heights - heights.min()) / (heights.max() - heights.min()))


def test_fog_stays_below_the_brightest_and_leaves_black_alone():
    for severity in range(1, 6):
        amount = constants("fog", severity)[0]
        assert not corrupt(flat(0, 2), "fog", severity).any()
        foggy = corrupt(flat(200, 4), "fog", severity).astype(int)
        plain = 200 / 255
        # Clouds run from 0 to 1 in each image: the least is the image dimmed, the most the brightest value there was.
        assert np.abs(foggy.min(axis=(1, 2, 3)) - 200 * plain / (plain + amount)).max() <= 1
        assert np.abs(foggy.max(axis=(1, 2, 3)) - 200).max() <= 1
        assert (foggy == foggy[:, :, :, :1]).all()


def test_frost_adds_a_share_of_ice():
    for severity in range(1, 6):
        share, ice = constants("frost", severity)
        plain, dark = (corrupt(flat(value, 6), "frost", severity).astype(int) for value in (60, 0))
        fits = dark < 255 - 60
        assert np.abs(plain - dark - 60 * share)[fits].max() <= 1
        assert dark.max() <= ice * 255
        assert len({image.tobytes() for image in dark}) == 6


def test_textures_of_frost():
    made = [frost_texture(k, 32) for k in range(TEXTURES)]
    for texture in made:
        assert texture.shape == (128, 128, 3) and texture.min() >= 0 and texture.max() <= 1
        assert 0.3 < texture.mean() < 0.7 and texture.std() > 0.1
        inside = np.abs(np.diff(texture, axis=0)).mean()
        assert np.abs(texture[0] - texture[-1]).mean() < 1.5 * inside  # goes on over its edges
        assert (texture[..., 2] >= texture[..., 0]).all()  # ice is bluish
    assert len({texture.tobytes() for texture in made}) == TEXTURES
    assert frost_texture(0, 100).shape[0] >= 200


def test_snow_falls_twice_turned_around():
    for severity in range(1, 6):
        dark = corrupt(flat(0, 4), "snow", severity).astype(int)
        # On black both layers stand on a constant; the second is the first one turned by 180 degrees.
        assert np.abs(dark - dark[:, ::-1, ::-1]).max() <= 1
        assert dark.min() >= int((1 - constants("snow", severity)[-1]) * 0.5 * 255) - 1
        assert dark.max() > dark.min() + 50
        x = pictures(4)
        assert (corrupt(x, "snow", severity).astype(int) >= x.astype(int) - 1).all()


# --- digital ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_colours_against_colorsys(name, severity):
    x = np.concatenate([pictures(1, side=16), pictures(1, 1, 16)])
    x[0, 0, :4] = [[0, 0, 0], [255, 255, 255], [77, 77, 77], [255, 0, 0]]  # black, white, grey, a pure colour
    made = corrupt(x, name, severity).astype(int)
    c = constants(name, severity)
    for before, after in zip(x.reshape(-1, 3).tolist(), made.reshape(-1, 3).tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in before))
        if name == "brightness":
            value = min(value + c, 1)
        else:
            saturation = min(max(saturation * c[0] + c[1], 0), 1)
        expected = colorsys.hsv_to_rgb(hue, saturation, value)
        assert max(after) == int(value * 255)
        assert max(abs(a - e * 255) for a, e in zip(after, expected, strict=True)) <= 1 + 1e-9


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_in_closed_form(severity):
    x, share = pictures(3), constants("contrast", severity)
    for before, after in zip(x, corrupt(x, "contrast", severity), strict=True):
        means = [before[:, :, c].astype(int).sum() / 1024 for c in range(3)]
        expected = np.clip([share * before[:, :, c] + (1 - share) * means[c] for c in range(3)], 0, 255).transpose(1, 2, 0)
        assert (expected - after).min() > -1e-6 and (expected - after).max() < 1 + 1e-6  # cut off


class Fixed:
    """Draws that move all corners alike and displace nothing."""

    def __init__(self, right, down):
        self.corners = np.tile([float(right), float(down)], (1, 3, 1))

    def uniform(self, low, high, shape=()):
        return self.corners if shape == (3, 2) else np.zeros((1, *shape))


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (0, 2), (-2, 1)])
def test_elastic_moves_as_the_corners_do(right, down):
    x = pictures(1)
    made = elastic_transform(x, constants("elastic_transform", 1), Fixed(right, down))[0]
    rows, columns = np.arange(5, 27), np.arange(5, 27)
    assert np.abs(made[np.ix_(rows, columns)].astype(int) - x[0][np.ix_(rows - down, columns - right)]).max() <= 1


def test_elastic_of_the_first_severity_is_affine():
    ramp = np.repeat(np.arange(32)[None, :, None] * 3 + np.arange(32)[:, None, None] * 4, 3, axis=2).astype(np.uint8)
    made = corrupt(np.repeat(ramp[None], 10, axis=0), "elastic_transform", 1)[:, 10:22, 10:22, 0].astype(int)
    for axis in (1, 2):
        assert np.abs(np.diff(made, 2, axis=axis)).max() <= 1  # straight, but for whole bytes
    slopes = (made[:, 0, -1] - made[:, 0, 0]) / 11
    assert slopes.std() > 0.05 and np.abs(slopes - 3).max() < 2


def test_elastic_displaces_by_less_than_its_size():
    assert np.abs(corrupt(flat(90, 3), "elastic_transform", 5).astype(int) - 90).max() <= 1
    for severity in range(2, 6):
        amount, _, affine = constants("elastic_transform", severity)
        ramp = np.broadcast_to((np.arange(32) * 8).astype(np.uint8)[None, None, :, None], (8, 32, 32, 3)).copy()
        moved_by = np.abs(corrupt(ramp, "elastic_transform", severity).astype(int) - ramp)[:, 11:21, 11:21] / 8
        assert moved_by.max() < 32 * (amount + 3 * affine) + 1


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_takes_boxes(severity):
    x = pictures(2)

    def boxes(line, size):
        """Means of the pixels whose middle lies in each box, rounded to bytes."""
        wide, made = len(line) / size, np.zeros((size, *line.shape[1:]))
        for k in range(size):
            reach = max(wide, 1) / 2
            middles = [i for i in range(len(line)) if -reach < i + 0.5 - (k + 0.5) * wide <= reach]
            made[k] = line[middles].mean(axis=0)
        return np.floor(made + 0.5)

    side = int(32 * constants("pixelate", severity))
    for before, after in zip(x, corrupt(x, "pixelate", severity), strict=True):
        image = before.astype(float)
        for size in (side, 32):
            image = boxes(image.transpose(1, 0, 2), size).transpose(1, 0, 2)  # columns first
            image = boxes(image, size)
        assert np.abs(after - image).max() <= 1


LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)  # fmt: skip
"""The JPEG standard's table K.1."""


@pytest.mark.parametrize("severity", range(1, 6))
def test_jpeg_of_grey_images_is_a_rounded_cosine_transform(severity):
    x = np.repeat(pictures(2)[..., :1], 3, axis=3)
    quality = constants("jpeg_compression", severity)
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = np.clip((LUMINANCE * scale + 50) // 100, 1, 255)
    blocks = x[..., 0].reshape(2, 4, 8, 4, 8).transpose(0, 1, 3, 2, 4) - 128.0
    rounded = np.rint(fft.dctn(blocks, axes=(3, 4), norm="ortho") / steps) * steps
    expected = np.clip(fft.idctn(rounded, axes=(3, 4), norm="ortho") + 128, 0, 255).transpose(0, 1, 3, 2, 4).reshape(2, 32, 32, 1)
    away = np.abs(corrupt(x, "jpeg_compression", severity) - expected)
    assert (away <= 2).mean() > 0.95 and away.mean() < 0.6  # integer transforms round some coefficients the other way


# --- spatter ---------------------------------------------------------------------------------------------------------


def test_edges_of_a_box_are_a_thin_ring():
    box = np.zeros((2, 20, 20), np.uint8)
    box[0, 6:14, 5:15] = 200
    found = edges(box)
    assert not found[1].any()
    inside, _ = ndimage.label(~found[0])
    assert inside[10, 10] != inside[0, 0]  # closed
    for row in (9, 10):
        assert found[0, row].sum() == 2  # one pixel on each side
    for column in (9, 10):
        assert found[0, :, column].sum() == 2
    near = ndimage.binary_dilation(box[0] > 0) & ~ndimage.binary_erosion(box[0] > 0)
    assert (near | ~found[0]).all()


def test_faint_edges_count_only_beside_strong_ones():
    steps = np.zeros((1, 16, 16), np.uint8)
    steps[0, :, 8:] = 20  # a gradient of 80: weak
    assert not edges(steps).any()
    steps[0, :, 8:] = np.linspace(20, 60, 16)[:, None].astype(np.uint8)  # strong further down
    assert edges(steps)[0].any(axis=1).sum() > 10


def test_equalized():
    assert equalized(np.array([[5, 5], [7, 9]], np.uint8)).tolist() == [[0, 0], [128, 255]]
    assert equalized(np.full((2, 2), 7, np.uint8)).tolist() == [[7, 7], [7, 7]]


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_is_light_of_its_colour(severity):
    dark = corrupt(flat(0, 12), "spatter", severity).astype(int)
    assert np.abs(dark - dark[..., 1:2] * WATER / WATER[1]).max() <= 1
    wet = dark[..., 1].max(axis=(1, 2))
    strength = constants("spatter", severity)[4]
    assert set(wet.tolist()) <= {0, int(strength * 238)} and (wet > 0).sum() >= 6  # the brightest drop of an image, or none at all
    x = pictures(3)
    assert (corrupt(x, "spatter", severity) >= x - (x > 0)).all()


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_covers(severity):
    made = corrupt(flat(200, 12), "spatter", severity).astype(int)
    cover = (200 - made[..., 0]) / (200 - 255 * MUD[0])
    assert np.abs(made - (200 + cover[..., None] * (255 * MUD - 200))).max() <= 2
    covered = cover > 0.01
    assert 0.01 < covered.mean() < 0.5 and cover[covered].min() > 0.79


# --- all of them -----------------------------------------------------------------------------------------------------


def test_the_names_and_constants():
    assert len(CORRUPTIONS) == 15 and len(EXTRA_CORRUPTIONS) == 4 and not set(CORRUPTIONS) & set(EXTRA_CORRUPTIONS)
    assert CORRUPTIONS[:3] == ("gaussian_noise", "shot_noise", "impulse_noise") and CORRUPTIONS[-1] == "jpeg_compression"
    assert all(len(table._ALL[name].constants) == 5 for name in ALL)


RISING = [name for name in ALL if name not in {"glass_blur", "frost", "elastic_transform", "saturate", "spatter"}]
"""The others' constants do not rise in all parts: glass is smoother at 3 and 5, frost keeps less of the image and grows no lighter,
the affine part of elastic shrinks, saturate goes both ways, spatter changes from water to mud."""


@pytest.mark.parametrize("name", RISING)
def test_severity_is_monotone(name):
    x = pictures(60)
    errors = [float(((corrupt(x, name, severity) / 255 - x / 255) ** 2).mean()) for severity in range(1, 6)]
    # Motion blur's third and fourth differ in a radius beyond the Gaussian's reach: equal but for the angles drawn.
    slack = 0.9 if name == "motion_blur" else 1.0
    assert all(later > slack * earlier for earlier, later in pairwise(errors)), errors
    assert errors[0] > 0 and errors[4] > 1.5 * errors[0]


@pytest.mark.parametrize("name", ALL)
def test_draws_depend_on_the_image_alone(name, monkeypatch):
    x = pictures(7)
    before = x.copy()
    for severity in (2, 5):
        whole = corrupt(x, name, severity, seed=3)
        assert whole.dtype == np.uint8 and whole.shape == x.shape and np.array_equal(x, before)
        assert np.array_equal(whole, corrupt(x, name, severity, seed=3))
        order = np.array([6, 2, 3])
        assert np.array_equal(corrupt(x[order], name, severity, seed=3, index=order), whole[order])
        with monkeypatch.context() as patch:
            patch.setattr(table, "TOGETHER", 2)
            assert np.array_equal(corrupt(x, name, severity, seed=3), whole)


DRAWN = [name for name in ALL if name not in {"defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "saturate"}]
DRAWN = [name for name in DRAWN if name not in {"pixelate", "jpeg_compression"}]


@pytest.mark.parametrize("name", DRAWN)
def test_seed_and_index_change_what_is_drawn(name):
    x = np.repeat(pictures(1), 4, axis=0)
    made = corrupt(x, name, 4)
    assert len({image.tobytes() for image in made}) == 4
    assert not np.array_equal(made, corrupt(x, name, 4, seed=1))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(8, 8), (40, 24)])
def test_other_sizes(name, shape):
    x = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    assert corrupt(x, name, 5).shape == x.shape
    assert corrupt(x[:0], name, 5).shape == (0, *shape, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((1, 32, 32, 3), np.float32)}, r"x: must be uint8 \[N, H, W, 3\].*got float32 \[1, 32, 32, 3\]; transpose"),
        ({"x": np.zeros((1, 3, 32, 32), np.uint8)}, r"got uint8 \[1, 3, 32, 32\]"),
        ({"x": np.zeros((32, 32, 3), np.uint8)}, r"got uint8 \[32, 32, 3\]"),
        ({"x": np.zeros((1, 4, 32, 3), np.uint8)}, "sides of at least 8"),
        ({"x": [[0]]}, "got list"),
        ({"corruption": "rain"}, "corruption: must be one of gaussian_noise, .*saturate, got 'rain'; name one"),
        ({"corruption": ["fog"]}, r"got \['fog'\]"),
        ({"severity": 0}, "severity: must be from 1 to 5, got 0; pass 5"),
        ({"severity": 6}, "got 6"),
        ({"severity": 2.0}, "severity: must be an integer, got 2.0"),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"index": np.array([0])}, r"index: must be integers from 0, \[2\], one for each image, got int64 \[1\] from 0"),
        ({"index": np.array([0, -2])}, r"got int64 \[2\] from -2; leave it out"),
        ({"index": np.array([0.0, 1.0])}, r"got float64 \[2\];"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = {"x": np.zeros((2, 32, 32, 3), np.uint8), "corruption": "fog", "severity": 3, **change}
    with pytest.raises(InputError, match=words):
        corrupt(given.pop("x"), given.pop("corruption"), given.pop("severity"), **given)
