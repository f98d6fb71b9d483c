"""Small sets that represent a larger one."""

import torch

from tritoncaps._checks import check_size
from tritoncaps.data.sets import AnySet


def stratified_subset(images: AnySet, count: int, seed: int) -> AnySet:
    """Take `count` images with the class proportions of the whole set.

    With the same seed, a smaller subset is contained in every larger one. So a comparison by size
    compares sets that grew, not unrelated ones. The global random state is neither read nor
    changed.

    Args:
        images: the set to take from.
        count: how many images, 1 .. N. Each class gets its share, as nearly as nested subsets
            allow.
        seed: chooses the images within each class.

    Returns:
        A copy of the chosen images, in the order of the original.

    Raises:
        ValueError: the set has fewer than `count` images.

    Example:
        >>> from tritoncaps.data import ImageSet
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
    # Spread the images of each class evenly over 0 .. 1, and sort all of them by position. Every
    # prefix then has each class in proportion, and a longer prefix contains a shorter one.
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        rank = torch.randperm(len(members), generator=generator)
        place[members] = (rank.double() + 0.5) / max(1, len(members))
    chosen = torch.sort(place, stable=True).indices[:count]
    return images.subset(chosen.sort().values)
