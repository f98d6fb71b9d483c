"""The most memory that the tensors of a call take, counted as they come and go."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all live tensors that were made inside, and their peak.

    Unlike the peak of a process this depends on no allocator, so a test can compare it with a
    formula. Scratch space inside a torch operator is not a tensor and does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}
        self._given: set[StorageWeakRef] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what an operator returns. Its inputs were there before, or are counted already."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self._storages:
                    self._given.add(storage)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self._given:
                    self._storages[storage] = tensor.untyped_storage().nbytes()
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._storages.values()))
        return result
