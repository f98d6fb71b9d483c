"""A search for launch configurations of the Triton kernels that beat those of the rules.

The result is `launch_table.json`, with the configurations for this architecture that were right and
faster. The kernels load it if the environment variable TRITONCAPS_LAUNCH_TABLE names it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import SHAPES, Case, batch_size
from benchmarks.operators import input_sets, phase_task
from benchmarks.oracle import FallbackError, Oracle, gradients
from benchmarks.report import NO_TIME
from benchmarks.rivals import op_rival, ours
from benchmarks.session import Session, reason, timed
from benchmarks.timing import Task, replayed

Config = dict[str, int]

# What a search tries, one after the other, each on top of the best so far: a launch keyword and the
# factor for it. A keyword that is 1, or that the kernel does not have, stays unchanged.
_CHOICES = (
    ("MAX_SPLITS", 2),
    ("MAX_SPLITS", 0.5),
    ("BLOCK_I", 2),
    ("BLOCK_I", 0.5),
    ("BLOCK_B", 2),
    ("BLOCK_B", 0.5),
    ("BLOCK_J", 2),
    ("BLOCK_J", 0.5),
    ("num_warps", 2),
    ("num_warps", 0.5),
    ("num_stages", 0.67),
    ("num_stages", 0.34),
)
# A smaller gain may be noise, and is not worth an entry.
_WORTHWHILE = 1.03


class _Table(dict[str, Config]):
    """A launch table that also records what the rules choose for each requested entry."""

    def __init__(self) -> None:
        super().__init__()
        self.rules: dict[str, Config] = {}


@contextmanager
def launch_table() -> Iterator[_Table]:
    """Replace the table of the kernels, and note what their rules choose."""
    from tritoncaps.kernels import _launch

    table, look_up = _Table(), _launch._look_up

    def note(name: str, launch: Config) -> Config:
        table.rules[name] = launch
        return look_up(name, launch)

    with (
        mock.patch.object(_launch, "_table", table),
        mock.patch.object(_launch, "_look_up", note),
    ):
        yield table


def run_launch(session: Session) -> None:
    """Search for faster launch configurations of the Triton kernels."""
    if ours(session.device) != "triton":
        session.report.add([{"left_out": "the kernels do not run on this device"}])
        return
    entries: dict[str, Config] = {}
    with launch_table() as table:
        for case in launch_cases(session.device, session.quick):
            print(case, flush=True)
            if session.is_over():
                session.report.add([{"case": str(case), **NO_TIME}])
                continue
            try:
                oracle = Oracle(case, session.device)
                phases = tuned_rules(case, oracle, table)
                for name, phase in phases.items():
                    entries |= search(session, case, oracle, table, name, phase)
                    path = session.report.path.with_name("launch_table.json")
                    path.write_text(json.dumps(entries, indent=1) + "\n")
            except Exception as error:  # the other cases continue
                session.report.add([{"case": str(case), "left_out": reason(error)}])
    session.report.note(table=entries)


def launch_cases(device: torch.device, quick: bool) -> list[Case]:
    """List what is tuned, the most important first."""
    if quick:
        return [Case("fused_dynamic_routing", SHAPES["tiny"], 4, name="tiny")]
    chosen = (
        ("fused_dynamic_routing", "mnist", "fp32"),
        ("fused_dynamic_routing", "second", "fp32"),
        ("fused_dynamic_routing", "mnist", "bf16"),
        ("fused_dynamic_routing", "classes100", "fp32"),
        ("dynamic_routing", "mnist", "fp32"),
        ("fused_dynamic_routing", "cifar", "fp32"),
    )
    return [
        Case(op, SHAPES[name], batch_size(name, device), precision=precision, name=name)
        for op, name, precision in chosen
    ]


def tuned_rules(case: Case, oracle: Oracle, table: _Table) -> dict[str, str]:
    """Name the entries that a case requests, and the phase in which each matters."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in oracle.arguments.items()}
    function = op_rival("triton", case, next(iter(leaves.values())).device)
    table.rules.clear()
    with torch.no_grad():
        function(**oracle.arguments)
    forward = set(table.rules)
    outputs = function(**leaves)
    table.rules.clear()
    torch.autograd.grad(outputs, list(leaves.values()), list(oracle.grads.values()))
    backward = set(table.rules)
    gradients(function, oracle.arguments, oracle.grads)
    return {
        name: "both" if name in forward & backward else "forward" if name in forward else "backward"
        for name in table.rules
    }


def search(
    session: Session, case: Case, oracle: Oracle, table: _Table, name: str, phase: str
) -> dict[str, Config]:
    """Tune one entry in one phase. Return it, or nothing if the rule's choice is best."""
    print(f"  {name}", flush=True)
    rule = table.rules[name]
    best: Config = {}
    for keyword, factor in _CHOICES:
        value = int({**rule, **best}.get(keyword, 1) * factor)
        if rule.get(keyword, 1) == 1 or value == 0 or session.is_over():
            continue
        candidate = {**best, keyword: value}
        if keyword == "num_warps" and rule.get("GROUPS", 1) > 1:
            candidate["GROUPS"] = value  # a group is what one warp works on
        row = {"case": f"{name} B={case.B}", "phase": phase, "config": candidate}
        try:
            table[name] = candidate
            oracle.check(op_rival("triton", case, session.device))
            tasks = {
                "best": _task(session, case, table, name, phase, best),
                "candidate": _task(session, case, table, name, phase, candidate),
            }
            timings = session.time(tasks, seconds=2.0)
        except FallbackError as error:  # it does not fit on this device, which is a result too
            session.report.add([row | {"refused": reason(error)}], "phase", "config")
            continue
        except Exception as error:  # the other candidates continue
            session.report.add([row | {"left_out": reason(error)}], "phase", "config")
            continue
        speedup = timings["best"].median / timings["candidate"].median
        session.report.add(
            [row | timed(timings["candidate"]) | {"speedup": speedup}], "phase", "config"
        )
        if speedup > _WORTHWHILE:
            best = candidate
    table[name] = best
    return {name: best} if best else {}


def _task(
    session: Session, case: Case, table: _Table, name: str, phase: str, config: Config
) -> Task:
    """Make a task that runs a phase with a configuration. On a GPU, its graph is captured too."""
    sets = input_sets(case, phase, session.device)[: 2 if session.quick else None]
    grads = case.output_gradients(session.device)
    task = phase_task(op_rival("triton", case, session.device), phase, sets, grads)

    def run(state: Any) -> None:
        table[name] = config
        task.run(state)

    configured = Task(run, task.prepare, task.calls)
    return replayed(configured) if session.device.type == "cuda" else configured
