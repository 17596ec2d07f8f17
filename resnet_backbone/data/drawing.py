"""Draw textured shapes on cluttered backgrounds for the generated data sets.

The shape alone defines the class. Colors, texture, size, aspect ratio, rotation and position are drawn from the same
distributions for all classes, so neither color nor texture tells them apart. Lengths are in pixels, angles in radians,
images `(H, W, 3)` uint8.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

_FRACTION_BITS = 4  # of OpenCV's fixed-point coordinates, for subpixel corners
_ENLARGED = 4  # scale factor in each direction while filling a polygon


def _circle(radius: float, count: int = 40) -> np.ndarray:
    return _polar(np.full(count, radius))


def _polar(radii: np.ndarray, start: float = 0.0) -> np.ndarray:
    """Corners `(n, 2)` at the given distances from the origin, in equal angular steps."""
    angles = start + np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _crescent() -> np.ndarray:
    """A disc minus an equal, offset disc: along the outer arc, then back along the other disc's edge."""
    reach = math.radians(125)
    outer = np.linspace(-reach, reach, 40)
    tip = np.array([math.cos(reach), math.sin(reach)])
    center = np.array([-0.45, 0.0])
    radius = float(np.linalg.norm(tip - center))
    angle = math.atan2(tip[1], tip[0] - center[0])
    inner = np.linspace(angle, -angle, 30)[1:-1]
    arc = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    back = center + radius * np.stack([np.cos(inner), np.sin(inner)], axis=1)
    return np.concatenate([arc, back]) - [0.25, 0.0]


def _cross(arm: float = 0.34) -> np.ndarray:
    quarter = np.array([[1.0, -arm], [1.0, arm], [arm, arm]])
    corners, block = [], quarter
    for _ in range(4):
        corners.append(block)
        block = np.stack([-block[:, 1], block[:, 0]], axis=1)
    return np.concatenate(corners)


# Each shape roughly fills the unit circle; multiple contours combine by the even-odd rule.
SHAPES: dict[str, list[np.ndarray]] = {
    "disc": [_circle(0.9)],
    "square": [_polar(np.full(4, 1.1), math.pi / 4)],
    "triangle": [_polar(np.full(3, 1.15))],
    "star": [_polar(np.tile([1.15, 0.48], 5))],
    "ring": [_circle(1.0), _circle(0.52)],
    "cross": [_cross()],
    "crescent": [_crescent()],
    "arrow": [
        np.array([[1.1, 0.0], [0.15, 0.85], [0.15, 0.32], [-1.0, 0.32], [-1.0, -0.32], [0.15, -0.32], [0.15, -0.85]])
    ],
}
CLASS_NAMES = list(SHAPES)


@dataclass
class Outline:
    """A shape or blob at its position.

    Attributes:
        contours: corners `(n, 2)` as x, y; the center of the top left pixel is (0, 0). Even-odd rule.
        area: of the whole outline, including parts outside the image, in square pixels.
    """

    contours: list[np.ndarray]
    area: float


@dataclass
class Stamp:
    """An outline's pixels: `coverage` `(h, w)` uint8 (255: inside), placed at top, left in the image."""

    top: int
    left: int
    coverage: np.ndarray

    def window(self, image: np.ndarray) -> np.ndarray:
        height, width = self.coverage.shape
        return image[self.top : self.top + height, self.left : self.left + width]


def _area(contours: list[np.ndarray]) -> float:
    """Even-odd area of nested contours."""
    areas = [
        abs(float(np.dot(c[:, 0], np.roll(c[:, 1], -1)) - np.dot(c[:, 1], np.roll(c[:, 0], -1)))) / 2 for c in contours
    ]
    return 2 * max(areas) - sum(areas)


_UNIT_AREAS = {name: _area(contours) for name, contours in SHAPES.items()}


def place_shape(name: str, center: tuple[float, float], radius: float, rng: np.random.Generator) -> Outline:
    """Place a shape of roughly the given radius at `center` (x, y), stretched by up to 1.5 and rotated by any angle."""
    stretch = math.exp(rng.uniform(-0.2, 0.2))
    turn, axis = (_rotation(angle) for angle in rng.uniform(0, 2 * math.pi, 2))
    matrix = turn @ np.diag([radius * stretch, radius / stretch]) @ axis
    contours = [contour @ matrix.T + center for contour in SHAPES[name]]
    return Outline(contours, _UNIT_AREAS[name] * radius**2)


def place_blob(center: tuple[float, float], radius: float, rng: np.random.Generator) -> Outline:
    """Place an irregular rounded patch that resembles none of the shapes."""
    angles = np.arange(24) * (2 * math.pi / 24)
    waves = np.arange(2, 5)[:, None]
    heights = rng.uniform(0.1, 0.35, (3, 1))
    radii = radius * (1 + (heights * np.cos(waves * angles + rng.uniform(0, 2 * math.pi, (3, 1)))).sum(0))
    contours = [_polar(radii) + center]
    return Outline(contours, _area(contours))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def stamp(outline: Outline, height: int, width: int) -> Stamp | None:
    """Rasterize the outline in an image of that size; None if it lies outside."""
    corners = np.concatenate(outline.contours)
    left, top = np.maximum(np.floor(corners.min(0)).astype(int) - 1, 0).tolist()
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 2, (width, height)).tolist()
    if left >= right or top >= bottom:
        return None
    # Draw enlarged and average: OpenCV's own antialiasing grows a filled polygon by half a pixel all around.
    large = np.zeros(((bottom - top) * _ENLARGED, (right - left) * _ENLARGED), np.uint8)
    fixed = [
        np.rint(((contour - (left, top) + 0.5) * _ENLARGED - 0.5) * 2**_FRACTION_BITS).astype(np.int32)
        for contour in outline.contours
    ]
    cv2.fillPoly(large, fixed, 255, cv2.LINE_8, _FRACTION_BITS)
    coverage = cv2.resize(large, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return Stamp(top, left, coverage)


def paint(image: np.ndarray, place: Stamp, rng: np.random.Generator, *, vivid: bool) -> None:
    """Fill a stamp with a random texture in two random colors.

    Shapes of every class are vivid, and clutter is as dim as the background. Objects stand out at a glance, as in
    photographs, while color says nothing about the class.
    """
    if vivid:
        first = rng.uniform(60, 255, 3)
        first *= rng.uniform(190, 235) / first.max()
    else:
        first = _dim_color(rng)
    second = np.clip(first + rng.normal(0, 25, 3), 0, 255)
    target = place.window(image)
    pattern = texture(*place.coverage.shape, rng)[:, :, None]
    filling = first.astype(np.float32) + pattern * (second - first).astype(np.float32)
    share = (place.coverage * np.float32(1 / 255))[:, :, None]
    target[:] = target + share * (filling - target)


def texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a pattern `(height, width)` float32 in 0...1: stripes, checks, dots, noise or a gradient."""
    kind = rng.integers(5)
    if kind == 0:
        cells = rng.random((max(2, height // 5), max(2, width // 5)), np.float32)
        return cv2.resize(cells, (width, height), interpolation=cv2.INTER_LINEAR)
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    along = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    if kind == 1:
        along -= along.min()
        return along / max(float(along.max()), 1.0)
    wave = np.float32(2 * math.pi / rng.uniform(5, 13))
    field = np.sin(along * wave + np.float32(phase))
    if kind > 2:
        across = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))
        field *= np.sin(across * wave)
        if kind == 4:  # dots: only the tops of the checks
            field -= 0.35
    return np.clip(field * 2.5 + 0.5, 0, 1)


def background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw smooth color noise with lines and blobs."""
    cells = tuple(rng.integers(2, 7, 2))
    colors = np.clip(_dim_color(rng) + rng.normal(0, 18, (*cells, 3)), 0, 255).astype(np.uint8)
    image = cv2.resize(colors, (width, height), interpolation=cv2.INTER_CUBIC)
    scale = min(height, width)
    for _ in range(rng.integers(3)):
        center = rng.uniform(0, (width, height))
        place = stamp(place_blob(center, rng.uniform(0.03, 0.09) * scale, rng), height, width)
        if place is not None:
            paint(image, place, rng, vivid=False)
    for _ in range(rng.integers(4)):
        line(image, rng.uniform(-0.1, 1.1, (2, 2)) * (width, height), rng)
    return image


def _dim_color(rng: np.random.Generator) -> np.ndarray:
    return np.clip(rng.uniform(40, 120) + rng.uniform(-25, 25, 3), 0, 255)


def line(image: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a thin line in a random color between two points `(2, 2)`, given as x, y."""
    (x0, y0), (x1, y1) = np.rint(ends * 2**_FRACTION_BITS).astype(int).tolist()
    color = rng.integers(0, 256, 3).tolist()
    cv2.line(image, (x0, y0), (x1, y1), color, int(rng.integers(1, 3)), cv2.LINE_AA, _FRACTION_BITS)


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add fine noise of about 5 levels to every pixel and channel."""
    return cv2.subtract(cv2.add(image, rng.integers(0, 17, image.shape, np.uint8)), (8.0, 8.0, 8.0, 0.0))
