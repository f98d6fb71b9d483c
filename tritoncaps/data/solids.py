"""Solid shapes, rendered from any viewpoint: a small stand-in for photographs of objects.

A solid is a convex part, from which another one may be cut. A convex part is what lies behind all
its faces. In a parallel projection the depth of a face is an affine function of the pixel. A ray
enters a part at the lowest of the faces towards the camera, and leaves it at the highest of the
others. So a minimum and a maximum over the faces render an image; no ray is traced.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tritoncaps._checks import check_flag, check_size
from tritoncaps.data.views import View, ViewSet

# The faces of a convex part, (F, 4): their outward normals and their distances from the origin.
Part = Tensor
# The body, what is cut from it, and the radius of a ball round the origin that holds the body.
Solid = tuple[Part, Part | None, float]
# Draws a number between two others.
Draw = Callable[[float, float], float]

# As in smallNORB, in degrees.
ELEVATIONS = tuple(range(30, 75, 5))
AZIMUTHS = tuple(range(0, 360, 20))

_SIDES = 28  # faces round a curved solid, in the directions (cos, sin)
_ROUND = [(math.cos(t), math.sin(t)) for t in (2 * math.pi * k / _SIDES for k in range(_SIDES))]
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
        elevations: of the camera, whole degrees in 0 .. 90.
        azimuths: of the camera, whole degrees. At 0 it sees the long side of a solid.
        lightings: directions of the light, from the left to the right.
        stereo: whether there are two channels, from cameras 6° apart.
        seed: decides proportions and sizes.

    Returns:
        The training set and the test set. Either has 5 · instances · elevations · azimuths ·
        lightings images, in the order of these factors.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or there is no viewpoint.

    Example:
        >>> train, test = rendered_solids(16, instances=1, elevations=[30], azimuths=[0, 90])
        >>> test
        ViewSet(N=30, C=1, H=16, W=16, device='cpu')
        >>> test.view("azimuth").tolist()[:6]
        [0, 0, 0, 90, 90, 90]
    """
    for name, value in (("size", size), ("instances", instances), ("lightings", lightings)):
        check_size("rendered_solids", name, value)
    _check_angles("elevations", elevations)
    _check_angles("azimuths", azimuths)
    outside = [elevation for elevation in elevations if not 0 <= elevation <= 90]
    if outside:
        raise ValueError(f"rendered_solids: elevations must be in 0 .. 90, got {outside[0]}")
    check_flag("rendered_solids", "stereo", stereo)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    eyes = (-_STEREO, _STEREO) if stereo else (0.0,)
    taken = [(elevation, azimuth) for elevation in elevations for azimuth in azimuths]
    sets = []
    for first in (0, instances):
        images, labels, views = [], [], []
        for label, make in enumerate(SOLIDS.values()):
            for instance in range(first, first + instances):
                solid, scale = make(draw), draw(0.8, 1.0)
                for e, a in taken:
                    pair = [_render(solid, scale, e, a + eye, lightings, size) for eye in eyes]
                    images.append(torch.stack(pair, dim=1))  # (lightings, C, size, size)
                    views += [View(instance, e, a, light) for light in range(lightings)]
                labels += [label] * (len(taken) * lightings)
        sets.append(ViewSet(torch.cat(images), torch.tensor(labels), torch.tensor(views)))
    return sets[0], sets[1]


def _check_angles(name: str, angles: object) -> None:
    for angle in angles if isinstance(angles, Sequence) else [angles]:
        if not isinstance(angle, int) or isinstance(angle, bool) or angle is angles:
            kind = type(angle).__name__
            raise TypeError(
                f"rendered_solids: {name} must be a sequence of ints (whole degrees), got {kind}"
            )
    if not angles:
        raise ValueError(f"rendered_solids: {name} is empty, but it needs at least one angle")


# The solids: x to the left and y towards the camera at azimuth 0, z upwards.


def _l_shape(draw: Draw) -> Solid:
    depth, height, thick = draw(0.4, 0.6), draw(0.7, 1.0), draw(0.4, 0.6)
    normals = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    body = _part(normals, [1, 1, depth, depth, height, height])
    cut = _part(normals, [2, 1 - thick, 2, 2, 2, height - thick])
    return body, cut, math.hypot(1, depth, height)


def _pyramid(draw: Draw) -> Solid:
    depth, height = draw(0.45, 0.7), draw(0.6, 0.85)
    # From each edge of the base at z = -height to the apex at z = height.
    steep = 2 * height
    normals = [(steep, 0, 1), (-steep, 0, 1), (0, steep, depth), (0, -steep, depth), (0, 0, -1)]
    reach = [height, height, depth * height, depth * height, height]
    return _part(normals, reach), None, math.hypot(1, depth, height)


def _cylinder(draw: Draw) -> Solid:
    radius = draw(0.4, 0.65)
    sides = [(0, cos, sin) for cos, sin in _ROUND]
    body = _part([*sides, (1, 0, 0), (-1, 0, 0)], [radius] * _SIDES + [1, 1])
    return body, None, math.hypot(1, radius)


def _cone(draw: Draw) -> Solid:
    radius = draw(0.55, 0.85)
    # From its base at x = -1 to the apex at x = 1, turned until it lies on the floor.
    sides = [(radius, 2 * cos, 2 * sin) for cos, sin in _ROUND]
    body = _part([*sides, (-1, 0, 0)], [radius] * _SIDES + [1])
    cos, sin = 2 / math.hypot(2, radius), radius / math.hypot(2, radius)
    x, y, z, reach = body.unbind(1)
    turned = torch.stack([cos * x + sin * z, y, cos * z - sin * x, reach], dim=1)
    return turned, None, math.hypot(1, radius)


def _ring(draw: Draw) -> Solid:
    inner, depth = draw(0.5, 0.65), draw(0.2, 0.35)
    sides, ends = [(cos, 0, sin) for cos, sin in _ROUND], [(0, 1, 0), (0, -1, 0)]
    body = _part([*sides, *ends], [1] * _SIDES + [depth, depth])
    hole = _part([*sides, *ends], [inner] * _SIDES + [2, 2])
    return body, hole, math.hypot(1, depth)


SOLIDS: dict[str, Callable[[Draw], Solid]] = {
    "L-shape": _l_shape, "pyramid": _pyramid, "cylinder": _cylinder, "cone": _cone, "ring": _ring,
}  # fmt: skip


def _part(normals: Sequence[tuple[float, float, float]], reach: Sequence[float]) -> Part:
    """Return the part behind the planes n·p = reach, whose normals n may have any length."""
    faces = torch.tensor([(*n, r) for n, r in zip(normals, reach, strict=True)])
    return faces / faces[:, :3].norm(dim=1, keepdim=True)


def _render(
    solid: Solid, scale: float, elevation: float, azimuth: float, lightings: int, size: int
) -> Tensor:
    """Render a solid in every lighting, uint8, (lightings, size, size)."""
    e, a = math.radians(elevation), math.radians(azimuth)
    above, right = torch.tensor([0.0, 0, 1]), torch.tensor([-math.cos(a), math.sin(a), 0])
    level = torch.tensor([math.sin(a), math.cos(a), 0])  # towards the camera, on the floor
    up = math.cos(e) * above - math.sin(e) * level
    camera = torch.stack([right, up, math.cos(e) * level + math.sin(e) * above], dim=1)

    body, cut, radius = solid
    side = 2 * size  # four rays a pixel
    place = _EXTENT * radius / scale * ((2 * torch.arange(side) + 1) / side - 1)
    rays = torch.stack(
        [torch.ones(side * side), place.repeat(side), (-place).repeat_interleave(side)]
    )
    front, normals, back, _ = _faces(body, camera)
    (top, face), bottom = (front @ rays).min(dim=0), (back @ rays).amax(dim=0)
    if cut is not None:
        front, _, back, inner = _faces(cut, camera)
        below, face_below = (back @ rays).max(dim=0)
        # The ray passes through what is cut away, to a face that looks into it.
        is_open = (below < top) & (top < (front @ rays).amin(dim=0))
        top = below.where(is_open, top)
        face = (face_below + len(normals)).where(is_open, face)
        normals = torch.cat([normals, -inner])

    # From the camera's left to its right.
    steps = (2 * torch.arange(lightings) + 1 - lightings) / max(1, lightings - 1)
    turns = torch.deg2rad(60 * steps)
    lights = level.outer(turns.cos()) + right.outer(turns.sin())
    lights = math.cos(_LIGHT) * lights + math.sin(_LIGHT) * above.unsqueeze(1)
    shades = _AMBIENT + (1 - _AMBIENT) * (normals @ lights).clamp(min=0)
    image = shades.T[:, face] * (top > bottom)
    mean = F.avg_pool2d(image.reshape(1, lightings, side, side), 2).squeeze(0)
    return (255 * mean).round().to(torch.uint8)


def _faces(part: Part, camera: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the depths, as factors of (1, x, y), and normals of front faces, then of back ones."""
    normals, reach = part[:, :3], part[:, 3]
    x, y, slope = (normals @ camera).unbind(1)
    # A face seen edge-on is turned by a hair, which changes no pixel.
    slope = slope.where(slope.abs() > 1e-6, 1e-6)
    depths = torch.stack([reach, -x, -y], dim=1) / slope.unsqueeze(1)
    is_front = slope > 0
    return depths[is_front], normals[is_front], depths[~is_front], normals[~is_front]
