"""The patches of a convolution, read where they lie in a grid of capsules.

A grid is (N, H, W, C, …). A K×K kernel has H'×W' positions on it, S apart. To all other kernels,
its patches are a batch of rows b with input capsules i:

    b = (n H' + y) W' + x,  i = (ky K + kx) C + c

The capsule lies at grid[n, S y + ky, S x + kx, c], which is an offset of b plus an offset of i. The
kernels that order u for the products read it there. So its patches are written once, in that order,
and never as (B, I, …). Their gradients are, and are added up in a fixed order, by (ky, kx).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Offsets ------------------------------------------------------------------------------------------


@triton.jit
def row_offsets(
    b, stride_b, stride_h, stride_w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr
):
    """Where the inputs of each batch row start. A grid has ROWS × COLUMNS rows for each image."""
    if ROWS == 0:
        return b * stride_b
    corner = b // COLUMNS % ROWS * stride_h + b % COLUMNS * stride_w
    return b // (ROWS * COLUMNS) * stride_b + corner * STEP


@triton.jit
def input_offsets(
    i, stride_i, stride_h, stride_w, KERNEL: tl.constexpr, TYPES: tl.constexpr
):  # fmt: skip
    """Where each input capsule of a row is."""
    if KERNEL == 0:
        return i * stride_i
    place = i // TYPES
    return place // KERNEL * stride_h + place % KERNEL * stride_w + i % TYPES * stride_i


# Kernels ------------------------------------------------------------------------------------------


@triton.jit
def _in_lanes_kernel(
    # pointers
    grid_ptr, lanes_ptr,
    # extents
    B, I,
    # strides
    stride_b, stride_i, stride_r, stride_p, stride_h, stride_w,
    # meta-parameters
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, KERNEL: tl.constexpr,
    TYPES: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_I input capsules of LANES rows, each as (P, LANES, R)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(I, BLOCK_I)
    tile = pid // blocks
    i = pid % blocks * BLOCK_I + tl.arange(0, BLOCK_I)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    n = tl.arange(0, BLOCK_N)[None, None, :].to(tl.int64)
    b = tile * LANES + lane
    r = n % R
    p = n // R
    ptrs = grid_ptr + row_offsets(b, stride_b, stride_h, stride_w, ROWS, COLUMNS, STEP)
    ptrs += input_offsets(i, stride_i, stride_h, stride_w, KERNEL, TYPES)
    exists = (i < I) & (p < P)
    values = tl.load(ptrs + r * stride_r + p * stride_p, exists & (b < B), other=0.0)
    ptrs = lanes_ptr + (tile * I + i) * (P * R * LANES) + (p * LANES + lane) * R + r
    tl.store(ptrs, values, exists)


@triton.jit
def _add_kernel(
    # pointers
    grads_ptr, out_ptr,
    # extents
    places, H, W, E,
    # meta-parameters
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_PLACES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add up a tile of a grid, (N·H·W, E), from the patches, (N, H', W', K, K, E)."""
    DTYPE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    place = tl.program_id(0).to(tl.int64) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)[:, None]
    e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    exists = (place < places) & (e < E)
    h = place // W % H
    w = place % W
    image = place // W // H * (ROWS * COLUMNS)
    total = tl.zeros((BLOCK_PLACES, BLOCK_E), DTYPE)
    for ky in range(KERNEL):
        y = (h - ky) // STEP
        has_y = (h >= ky) & ((h - ky) % STEP == 0) & (y < ROWS)
        for kx in range(KERNEL):
            x = (w - kx) // STEP
            has_x = (w >= kx) & ((w - kx) % STEP == 0) & (x < COLUMNS)
            row = (image + y * COLUMNS + x) * (KERNEL * KERNEL) + ky * KERNEL + kx
            ptrs = grads_ptr + row * E + e
            total += tl.load(ptrs, exists & has_y & has_x, other=0.0).to(DTYPE)
    tl.store(out_ptr + place * E + e, total, exists)


# Launchers ----------------------------------------------------------------------------------------


class Patches:
    """The K×K patches of a grid, as a batch (B, I, …) that has no memory of its own.

    It stands for a tensor where its values are read by offsets.
    """

    def __init__(self, grid: Tensor, kernel_size: int, step: int) -> None:
        N, H, W, C = grid.shape[:4]
        self.grid, self._kernel, self._step = grid, kernel_size, step
        self.size = (H - kernel_size) // step + 1, (W - kernel_size) // step + 1
        rows = N * self.size[0] * self.size[1]
        self.shape = torch.Size((rows, kernel_size**2 * C, *grid.shape[4:]))
        self.dtype, self.is_cuda, self.device = grid.dtype, grid.is_cuda, grid.device
        self.new_empty = grid.new_empty

    def stride(self) -> tuple[int, ...]:
        """The strides of an image, a type and what follows, then of a row and a column."""
        image, row, column, *rest = self.grid.stride()
        return image, *rest, row, column

    @property
    def modes(self) -> dict[str, int]:
        """What `row_offsets` and `input_offsets` need beside strides."""
        rows, columns = self.size
        return {
            "ROWS": rows, "COLUMNS": columns, "STEP": self._step, "KERNEL": self._kernel,
            "TYPES": self.grid.shape[3],
        }  # fmt: skip

    def copy(self) -> Tensor:
        """The patches in memory, (B, I, …)."""
        grid = self.grid
        for axis in (1, 2):
            grid = grid.unfold(axis, self._kernel, self._step)
        return grid.movedim((-2, -1), (3, 4)).reshape(self.shape)

    def in_lanes(self, lanes: int) -> Tensor:
        """The patches of matrices (R, P), as (tiles, I, P, lanes, R). See `_em_tiles.py`."""
        B, I, *matrix = self.shape
        R, P = matrix or (1, 1)
        tiles = triton.cdiv(B, lanes)
        made = self.new_empty(tiles, I, P, lanes, R)
        of_image, of_type, *of_matrix, of_row, of_column = self.stride()
        block_n = triton.next_power_of_2(R * P)
        block_i = max(1024 // (lanes * block_n), 1)
        if made.numel():
            _in_lanes_kernel[(tiles * triton.cdiv(I, block_i),)](
                self.grid, made,
                B, I,
                of_image, of_type, *(of_matrix or (0, 0)), of_row, of_column,
                R=R,
                P=P,
                BLOCK_I=block_i,
                BLOCK_N=block_n,
                LANES=lanes,
                **self.modes,
            )  # fmt: skip
        return made

    def add(self, grads: Tensor) -> Tensor:
        """The gradient of the grid, contiguous, from those of the patches, contiguous (B, I, …)."""
        out = torch.empty_like(self.grid, memory_format=torch.contiguous_format)
        N, H, W = self.grid.shape[:3]
        values = self.grid.shape[3:].numel()
        modes = self.modes
        del modes["TYPES"]
        block_e = min(triton.next_power_of_2(max(values, 1)), 256)
        block_places = 1024 // block_e
        if out.numel():
            _add_kernel[(triton.cdiv(N * H * W, block_places), triton.cdiv(values, block_e))](
                grads, out,
                N * H * W, H, W, values,
                BLOCK_PLACES=block_places,
                BLOCK_E=block_e,
                **modes,
            )  # fmt: skip
        return out


# What a kernel that does not read patches is told.
_NO_MODES = {"ROWS": 0, "COLUMNS": 0, "STEP": 0, "KERNEL": 0, "TYPES": 0}


def located(u: Tensor | Patches) -> tuple[Tensor, tuple[int, ...], dict[str, int]]:
    """A tensor that holds u, (B, I, P), its strides of b, i, p, h and w, and the modes."""
    if isinstance(u, Patches):
        return u.grid, u.stride(), u.modes
    return u, (*u.stride(), 0, 0), _NO_MODES
