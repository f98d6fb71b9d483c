"""How much memory the tensors of a call take at most, counted as they come and go."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors made inside that are alive, and their peak.

    Unlike the peak of a process it depends on no allocator, so a test can hold it to a formula.
    Scratch space inside an operator of torch is not a tensor and not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}
        self._given: set[StorageWeakRef] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what an operator returns; what it is given was there before, unless counted."""
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
