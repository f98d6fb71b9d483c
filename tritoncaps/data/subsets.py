"""Smaller sets that stand for a larger one."""

import torch

from tritoncaps._checks import check_size
from tritoncaps.data.sets import ImageSet


def stratified_subset(images: ImageSet, count: int, seed: int) -> ImageSet:
    """Take `count` images that hold the classes in the proportions of the whole set.

    With the same seed a smaller subset is part of every larger one, so that accuracies by size
    compare sets that were extended, not replaced. The global random state is neither read nor
    changed.

    Args:
        images: the set to take from.
        count: how many, 1 .. N. Each class gets its share of them, as nearly as subsets that
            contain each other can give it.
        seed: chooses the images within each class.

    Returns:
        The subset, in the order of the original; all of it is a copy.

    Raises:
        ValueError: the set has no `count` images.

    Example:
        >>> labels = torch.arange(10).repeat(20)
        >>> train = ImageSet(torch.zeros(200, 1, 28, 28, dtype=torch.uint8), labels)
        >>> stratified_subset(train, 50, seed=1).labels.bincount().tolist()
        [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    """
    check_size("stratified_subset", "count", count)
    if count > len(images):
        raise ValueError(f"stratified_subset: count={count}, but there are {len(images)} images")
    labels = images.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    # The images of a class stand at equal distances in 0 .. 1: whatever length the prefix has, it
    # holds the share of each class, and the next longer prefix holds it.
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        rank = torch.randperm(len(members), generator=generator)
        place[members] = (rank.double() + 0.5) / max(1, len(members))
    chosen = torch.sort(place, stable=True).indices[:count]
    return images.subset(chosen.sort().values)
