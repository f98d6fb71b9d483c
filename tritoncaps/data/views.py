"""Image sets that know the viewpoint of every image."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritoncaps._checks import check_choice, shape_of
from tritoncaps.data.sets import ImageSet


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
