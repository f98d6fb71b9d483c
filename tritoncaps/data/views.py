"""Image sets that know the viewpoint of every image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritoncaps._checks import check_choice, shape_of
from tritoncaps.data.sets import ImageSet

# The familiar viewpoints of smallNORB's two protocols, in degrees (Hinton, Sabour, Frosst 2018).
FAMILIAR = {"azimuth": (300, 320, 340, 0, 20, 40), "elevation": (30, 35, 40)}


class View(NamedTuple):
    """What distinguishes images of one class, as in smallNORB.

    Args:
        instance: number of the object within its class.
        elevation: of the camera, in degrees above the horizon.
        azimuth: of the camera, in degrees.
        lighting: number of the lighting.
    """

    instance: int
    elevation: int
    azimuth: int
    lighting: int


@dataclass(frozen=True, eq=False, repr=False)
class ViewSet(ImageSet):
    """Images with their labels and views, on one device.

    Every function of this package that takes some images of a set, such as `stratified_subset`,
    keeps their views.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: class indices, int64, shape (N,).
        views: int64, shape (N, 4), the fields of `View`.

    Raises:
        TypeError, ValueError: as `ImageSet`, and for `views` likewise.

    Example:
        >>> images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
        >>> views = torch.tensor([View(0, 30, 20, 0), View(0, 30, 340, 0)])
        >>> taken = ViewSet(images, torch.tensor([1, 1]), views)
        >>> taken.subset(taken.view("azimuth") < 180)
        ViewSet(N=1, C=1, H=32, W=32, device='cpu')
    """

    views: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views.dtype != torch.int64:
            raise TypeError(f"ViewSet: views must be torch.int64, got {self.views.dtype}")
        expected = (len(self.labels), len(View._fields))
        if shape_of(self.views) != expected:
            raise ValueError(
                f"ViewSet: views must have shape (N, 4) = {expected}, got {shape_of(self.views)}"
            )
        if self.views.device != self.labels.device:
            raise ValueError(
                f"ViewSet: views is on {self.views.device} but labels is on {self.labels.device}"
            )

    def view(self, name: str) -> Tensor:
        """Return one field of all views by its name, shape (N,).

        Raises:
            ValueError: `View` has no such field.
        """
        check_choice("ViewSet.view", "name", name, View._fields)
        return self.views[:, View._fields.index(name)]


def familiar_and_novel(
    images: ViewSet, view: str, familiar: Sequence[int] | None = None
) -> tuple[ViewSet, ViewSet]:
    """Divide a set into the familiar viewpoints and all others, the novel ones.

    smallNORB has two such protocols (Hinton, Sabour, Frosst: Matrix capsules with EM routing,
    2018). A network is trained on the familiar part of the training set, and tested on both parts
    of the test set.

    - "azimuth": 300, 320, 340, 0, 20 and 40 degrees are familiar.
    - "elevation": the three lowest, 30, 35 and 40 degrees, are familiar.

    Args:
        images: the set.
        view: a field of `View`.
        familiar: the familiar values of this field. "azimuth" and "elevation" have those above.

    Returns:
        The familiar images and the novel ones, each in the order of the set.

    Raises:
        ValueError: `View` has no such field, `familiar` is missing, or one part would be empty.

    Example:
        >>> images = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
        >>> views = torch.tensor([[0, 30, 20, 0], [0, 30, 100, 0], [0, 70, 340, 0]])
        >>> taken = ViewSet(images, torch.tensor([1, 1, 1]), views)
        >>> [len(part) for part in familiar_and_novel(taken, "azimuth")]
        [2, 1]
    """
    angles = images.view(view)
    if familiar is None:
        if view not in FAMILIAR:
            raise ValueError(
                f"familiar_and_novel: view={view!r} has no usual protocol; give `familiar`"
            )
        familiar = FAMILIAR[view]
    is_familiar = torch.isin(angles, torch.tensor(list(familiar), device=angles.device))
    parts = images.subset(is_familiar), images.subset(~is_familiar)
    if not all(map(len, parts)):
        raise ValueError(
            f"familiar_and_novel: familiar={list(familiar)} is {len(parts[0]):,} of "
            f"{len(images):,} images, but it must be some and not all. Each {view} of the set is "
            f"one of {', '.join(map(str, angles.unique().tolist()))}"
        )
    return parts
