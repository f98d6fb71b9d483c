"""Solid shapes, rendered from any viewpoint: a small stand-in for photographs of objects.

A solid is a convex part, from which another one may be cut. A convex part is what lies behind all
its faces. In a parallel projection the depth of a face is an affine function of the pixel. A ray
enters a part at the lowest of the faces towards the camera, and leaves it at the highest of the
others. So there is nothing to search for, and numpy renders thousands of images in seconds.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tritoncaps._checks import check_size
from tritoncaps.data.views import View, ViewSet

Array = NDArray[np.floating[Any]]

# The outward normals of a convex part, (F, 3), and the distances of its faces from the origin, (F,)
Part = tuple[Array, Array]
# The body, what is cut from it, and the radius of a ball round the origin that holds the body.
Solid = tuple[Part, Part | None, float]

# As in smallNORB, in degrees.
ELEVATIONS = tuple(range(30, 75, 5))
AZIMUTHS = tuple(range(0, 360, 20))

_SIDES = 28  # faces round a curved solid, in the directions (cos, sin)
_ROUND = [(math.cos(t), math.sin(t)) for t in np.arange(_SIDES) * (2 * math.pi / _SIDES)]
_EXTENT = 1.05  # half the width of the image, for a solid of radius 1
_AMBIENT = 0.25  # the brightness of a face in shadow
_LIGHT = math.radians(40)  # the height of the lights
_STEREO = 3.0  # half the angle between the cameras of a stereo pair, in degrees


def rendered_solids(
    size: int = 32,
    *,
    instances: int = 5,
    elevations: Sequence[int] = ELEVATIONS,
    azimuths: Sequence[int] = AZIMUTHS,
    lightings: int = 3,
    stereo: bool = False,
    seed: int = 0,
) -> tuple[ViewSet, ViewSet]:
    """Render solids of five classes, every instance from every viewpoint in every lighting.

    The classes are L-shape, pyramid, cylinder, cone and ring. Cylinder and cone lie on the floor,
    the ring stands on it, and none looks the same from all sides. Instances differ in proportions
    and size. As in smallNORB, the lights stay with the camera while the solid turns, and the
    test set shows instances that the training set does not. Faces are shaded by Lambert's law, and
    the background is black.

    Args:
        size: height and width of the images in pixels.
        instances: of each class, in either set.
        elevations: of the camera, 0 .. 90 degrees.
        azimuths: of the camera, in degrees. At 0 it sees the long side of a solid.
        lightings: directions of the light, from the left to the right.
        stereo: whether there are two channels, from cameras 6° apart.
        seed: decides proportions and sizes.

    Returns:
        The training set and the test set. Either has 5 · instances · elevations · azimuths ·
        lightings images, in the order of these factors.

    Raises:
        TypeError, ValueError: a number is not an int of at least 1, or there is no viewpoint.

    Example:
        >>> train, test = rendered_solids(16, instances=1, elevations=[30], azimuths=[0, 90])
        >>> test
        ViewSet(N=30, C=1, H=16, W=16, device='cpu')
        >>> test.view("azimuth").tolist()[:6]
        [0, 0, 0, 90, 90, 90]
    """
    for name, value in (("size", size), ("instances", instances), ("lightings", lightings)):
        check_size("rendered_solids", name, value)
    rng = np.random.default_rng(seed)
    eyes = (-_STEREO, _STEREO) if stereo else (0.0,)
    taken = [(elevation, azimuth) for elevation in elevations for azimuth in azimuths]
    if not taken:
        raise ValueError("rendered_solids: elevations and azimuths must not be empty")
    sets = []
    for first in (0, instances):
        images, labels, views = [], [], []
        for label, make in enumerate(SOLIDS.values()):
            for instance in range(first, first + instances):
                solid, scale = make(rng), rng.uniform(0.8, 1.0)
                for e, a in taken:
                    pair = [_render(solid, scale, e, a + eye, lightings, size) for eye in eyes]
                    images.append(np.stack(pair, axis=1))  # (lightings, C, size, size)
                    views += [View(instance, e, a, light) for light in range(lightings)]
                labels += [label] * (len(taken) * lightings)
        pixels = torch.from_numpy(np.concatenate(images))
        sets.append(ViewSet(pixels, torch.tensor(labels), torch.tensor(views)))
    return sets[0], sets[1]


# The solids: x to the left and y towards the camera at azimuth 0, z upwards.


def _l_shape(rng: np.random.Generator) -> Solid:
    depth, height, thick = rng.uniform(0.4, 0.6), rng.uniform(0.7, 1.0), rng.uniform(0.4, 0.6)
    normals = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    body = _part(normals, [1, 1, depth, depth, height, height])
    cut = _part(normals, [2, 1 - thick, 2, 2, 2, height - thick])
    return body, cut, math.hypot(1, depth, height)


def _pyramid(rng: np.random.Generator) -> Solid:
    depth, height = rng.uniform(0.45, 0.7), rng.uniform(0.6, 0.85)
    # From each edge of the base at z = -height to the apex at z = height.
    steep = 2 * height
    normals = [(steep, 0, 1), (-steep, 0, 1), (0, steep, depth), (0, -steep, depth), (0, 0, -1)]
    reach = [height, height, depth * height, depth * height, height]
    return _part(normals, reach), None, math.hypot(1, depth, height)


def _cylinder(rng: np.random.Generator) -> Solid:
    radius = rng.uniform(0.4, 0.65)
    sides = [(0, cos, sin) for cos, sin in _ROUND]
    body = _part([*sides, (1, 0, 0), (-1, 0, 0)], [radius] * _SIDES + [1, 1])
    return body, None, math.hypot(1, radius)


def _cone(rng: np.random.Generator) -> Solid:
    radius = rng.uniform(0.55, 0.85)
    # From its base at x = -1 to the apex at x = 1, turned until it lies on the floor.
    sides = [(radius, 2 * cos, 2 * sin) for cos, sin in _ROUND]
    normals, reach = _part([*sides, (-1, 0, 0)], [radius] * _SIDES + [1])
    turn = np.array([[2, 0, -radius], [0, 0, 0], [radius, 0, 2]]) / math.hypot(2, radius)
    turn[1, 1] = 1
    return (normals @ turn.astype(np.float32), reach), None, math.hypot(1, radius)


def _ring(rng: np.random.Generator) -> Solid:
    inner, depth = rng.uniform(0.5, 0.65), rng.uniform(0.2, 0.35)
    sides, ends = [(cos, 0, sin) for cos, sin in _ROUND], [(0, 1, 0), (0, -1, 0)]
    body = _part([*sides, *ends], [1] * _SIDES + [depth, depth])
    hole = _part([*sides, *ends], [inner] * _SIDES + [2, 2])
    return body, hole, math.hypot(1, depth)


SOLIDS: dict[str, Callable[[np.random.Generator], Solid]] = {
    "L-shape": _l_shape, "pyramid": _pyramid, "cylinder": _cylinder, "cone": _cone, "ring": _ring,
}  # fmt: skip


def _part(normals: Sequence[tuple[float, float, float]], reach: Sequence[float]) -> Part:
    """Return the part behind the planes n·p = reach, whose normals n may have any length."""
    faces = np.column_stack([normals, reach]).astype(np.float32)
    faces /= np.linalg.norm(faces[:, :3], axis=1, keepdims=True)
    return faces[:, :3], faces[:, 3]


def _render(
    solid: Solid, scale: float, elevation: float, azimuth: float, lightings: int, size: int
) -> NDArray[np.uint8]:
    """Render a solid in every lighting, (lightings, size, size)."""
    e, a = math.radians(elevation), math.radians(azimuth)
    level = np.array([math.sin(a), math.cos(a), 0])  # towards the camera, on the floor
    right, above = np.array([-level[1], level[0], 0]), np.array([0, 0, 1])
    up = math.cos(e) * above - math.sin(e) * level
    towards = math.cos(e) * level + math.sin(e) * above
    camera = np.array([right, up, towards], np.float32).T

    body, cut, radius = solid
    side = 2 * size  # four rays a pixel
    place = _EXTENT * radius / scale * ((2 * np.arange(side) + 1) / side - 1)
    x, y = np.tile(place, side), np.repeat(-place, side)
    rays = np.array([np.ones_like(x), x, y], np.float32)
    front, normals, back, _ = _faces(body, camera)
    (top, face), bottom = _lowest(front @ rays), (back @ rays).max(axis=0)
    if cut is not None:
        front, _, back, inner = _faces(cut, camera)
        below, face_below = _lowest(-back @ rays)
        # The ray passes through what is cut away, to a face that looks into it.
        open = (-below < top) & (top < (front @ rays).min(axis=0))
        top, face = np.where(open, -below, top), np.where(open, face_below + len(normals), face)
        normals = np.concatenate([normals, -inner])

    # From the camera's left to its right.
    steps = (2 * np.arange(lightings) + 1 - lightings) / max(1, lightings - 1)
    turns = np.radians(60 * steps)
    lights = np.outer(level, np.cos(turns)) + np.outer(right, np.sin(turns))
    lights = math.cos(_LIGHT) * lights + math.sin(_LIGHT) * above[:, None]
    shades = _AMBIENT + (1 - _AMBIENT) * (normals @ lights.astype(np.float32)).clip(min=0)
    image = np.where(top > bottom, shades.T[:, face], 0).reshape(lightings, side, side)
    mean = (image[:, ::2] + image[:, 1::2]) / 4
    return (255 * (mean[:, :, ::2] + mean[:, :, 1::2])).round().astype(np.uint8)


def _faces(part: Part, camera: Array) -> tuple[Array, Array, Array, Array]:
    """Return the depths, as factors of (1, x, y), and normals of front faces, then of back ones."""
    normals, reach = part
    in_view = normals @ camera
    # A face seen edge-on is turned by a hair, which changes no pixel.
    slope = np.where(abs(in_view[:, 2]) < 1e-6, np.float32(1e-6), in_view[:, 2])
    depths = np.stack([reach, -in_view[:, 0], -in_view[:, 1]], axis=1) / slope[:, None]
    is_front = slope > 0
    return depths[is_front], normals[is_front], depths[~is_front], normals[~is_front]


def _lowest(depths: Array) -> tuple[Array, NDArray[np.intp]]:
    """Return the lowest depth at each ray, and which face has it; much faster than argmin."""
    lowest, face = depths[0].copy(), np.zeros(depths.shape[1], np.intp)
    for number, depth in enumerate(depths[1:], 1):
        np.copyto(face, number, where=depth < lowest)
        np.minimum(lowest, depth, out=lowest)
    return lowest, face
