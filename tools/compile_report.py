"""Predict what the kernels cost on a GPU, from what the compiler makes of them. Needs no GPU.

    python -m tools.compile_report --target sm90 --shape MNIST      # print one table
    python -m tools.compile_report --write                          # all tables of the page
    python -m tools.compile_report --check                          # compare with the page

The tables are in docs/gpu-model.md, which says what they mean. tools/gpu_model/ is the model.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import triton

from tools.gpu_model.compiling import compilers
from tools.gpu_model.launches import BATCH, MATRICES, ON_VECTORS, SHAPES
from tools.gpu_model.machine import MACHINES
from tools.gpu_model.tables import PAGE_SECTIONS, Section, differences, read_sections, write_section

PAGE = Path(__file__).parents[1] / "docs" / "gpu-model.md"
_BLOCK = re.compile(r"(<!-- predictions: start -->\n).*(<!-- predictions: end -->)", re.S)
MAIN = "fused_dynamic_routing"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    args = parse_arguments(arguments)
    factors = {}
    if args.factors is not None:
        factors = json.loads(args.factors.read_text())["factors"]
    if not (args.write or args.check):
        section = Section(args.target, args.precision, args.operator, tuple(args.shape))
        with compilers() as pool:
            print(write_section(section, pool.map, factors))
        return 0
    text = PAGE.read_text(encoding="utf-8")
    made = []
    with compilers() as pool:
        for section in PAGE_SECTIONS:
            print(section.title, flush=True)
            made.append(write_section(section, pool.map))
    block = f"Triton {triton.__version__}, B = {BATCH}.\n\n" + "\n".join(made)
    if args.write:
        PAGE.write_text(_BLOCK.sub(rf"\g<1>{block}\2", text), encoding="utf-8")
        return 0
    found = differences(read_sections(text), read_sections(block))
    print("\n".join(found))
    return 1 if found else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=MACHINES, default="sm90")
    parser.add_argument(
        "--shape", nargs="+", metavar="SHAPE",
        help=f"{', '.join(SHAPES)}; of em_routing {', '.join(MATRICES)}; default: the first",
    )  # fmt: skip
    parser.add_argument("--precision", choices=["highest", "high", "bf16"], default="highest")
    parser.add_argument("--operator", choices=[*ON_VECTORS, "em_routing"], default=MAIN)
    parser.add_argument(
        "--factors", type=Path, metavar="FILE",
        help="correct the prediction by what check_gpu measured",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--write", action="store_true", help=f"write the tables of {PAGE.name}")
    which.add_argument("--check", action="store_true", help="exit with 1 if they differ")
    args = parser.parse_args(arguments)
    shapes = SHAPES if args.operator in ON_VECTORS else MATRICES
    args.shape = args.shape or [next(iter(shapes))]
    for shape in args.shape:
        if shape not in shapes:
            parser.error(
                f"argument --shape: {args.operator} has no shape {shape!r}; choose from "
                f"{', '.join(map(repr, shapes))}"
            )
    return args


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("compile_report: unset TRITON_INTERPRET; interpreted kernels are not compiled")
    sys.exit(main())
