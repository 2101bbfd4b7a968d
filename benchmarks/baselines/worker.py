"""Measures all rows of one strategy on one workload, as one rank; `benchmarks.overhead` starts it.

    torchrun --nproc-per-node 2 -m benchmarks.baselines.worker '{"strategy": "ddp", ...}'

First each row makes some steps: rows whose losses differ from those of their base are refused. The
others then count what their steps call, twice, and are timed in blocks that take turns.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import random
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybrid.launch.threads import short_time_slices

from .measuring import Clock, Counting, step_losses
from .rows import Skipped, Turn, rows_of
from .workloads import COMPARED, LOG_EVERY, Workload

EQUAL = 1e-6  # relative difference of losses
TURN_S = 0.1  # of a row: what slows a machine for a second meets all, and few steps begin cold
TIMEOUT = datetime.timedelta(minutes=5)
ALL_ROWS = contextlib.ExitStack()  # what a rank is in until it ends


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds what one session of ranks measures, and the file it writes."""

    strategy: str
    workload: str
    blocks: int
    seconds: float  # of a block, by the hand-written loop
    rows: list[str]  # empty: all
    more: list[str]
    file: str


def main() -> None:
    """Run one rank of a session."""
    logging.disable(logging.WARNING)
    plan = Plan(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    rank, world_size = (int(os.environ.get(key, d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    workload = Workload(plan.workload, plan.strategy, rank, world_size)
    _prepare(workload)
    turns, found = _start_rows(plan, workload)
    _compare_losses(turns, found)
    for turn in turns:
        found[turn.row.name]["counts"] = _count(turn)
    steps = _steps_of_block(turns[0], plan) if turns else 1
    rounds = max(1, min(round(plan.seconds / TURN_S), steps // LOG_EVERY))
    _time(turns, found, plan.blocks, steps, rounds)
    if rank == 0:
        session = {"strategy": plan.strategy, "workload": plan.workload, "ranks": world_size}
        session |= {"batch": workload.batch, "steps_of_block": steps, "rounds": rounds}
        session |= {"short_time_slices": world_size > 1, "untimed_steps": LOG_EVERY}
        session |= {"rows": found}
        Path(plan.file).write_text(json.dumps(session))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # hybrid's loop has not ended, and never will


def _prepare(workload: Workload) -> None:
    """Join the process group, and keep DeepSpeed from compiling an all-reduce of its own.
    Building that takes up to a minute, and what it sends would be in no count."""
    if workload.world_size > 1:
        ALL_ROWS.enter_context(short_time_slices())
        dist.init_process_group("gloo", timeout=TIMEOUT)
    if workload.stages > 1 or workload.strategy.startswith("zero"):
        import deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore
        deepspeed.init_distributed("gloo", verbose=False)


def _gather(value: Any) -> list[Any]:
    """Return every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _start_rows(plan: Plan, workload: Workload) -> tuple[list[Turn], dict[str, dict[str, Any]]]:
    """Build each row and make its first steps; return those that run, and what is known of all."""
    turns: list[Turn] = []
    found: dict[str, dict[str, Any]] = {}
    rows = rows_of(plan.strategy, plan.more)
    asked = ["raw", "raw_again", *plan.rows, *plan.more]
    wanted = {name for r in rows if r.name in asked for name in (r.name, r.base, r.plain)}
    for row in rows:
        if plan.rows and row.name not in wanted:
            continue
        turn = Turn(row, workload)
        status, reason, losses = _first_steps(turn)
        if workload.world_size > 1 and not dist.is_initialized():
            raise RuntimeError(f"{row.name} {status} and has left the process group: {reason}")
        every = _gather((status, reason, losses))
        bad = next((one for one in every if one[0] != "ok"), None)
        status, reason, _ = bad or every[0]
        found[row.name] = dataclasses.asdict(row) | {"status": status, "reason": reason}
        if not bad:
            found[row.name]["losses"] = _mean_losses([one[2] for one in every])
            turns.append(turn)
    return turns, found


def _first_steps(turn: Turn) -> tuple[str, str | None, list[float]]:
    try:
        turn.build()
        return "ok", None, step_losses(turn.run(COMPARED))
    except Skipped as skipped:
        return "skipped", str(skipped), []
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {str(error)[:300]}", []


def _mean_losses(by_rank: list[list[float]]) -> list[float]:
    """Average the losses of those ranks that have some: of a pipeline, perhaps the last alone."""
    return [statistics.fmean(step) for step in zip(*(x for x in by_rank if x), strict=True)]


def _compare_losses(turns: list[Turn], found: dict[str, dict[str, Any]]) -> None:
    """Refuse the rows whose losses are not those of their base, and drop them from `turns`."""
    for turn in list(turns):
        mine, base = found[turn.row.name], found[turn.row.base]
        pairs = list(zip(mine["losses"], base.get("losses", []), strict=False))
        apart = [abs(a - b) / abs(b) if b else abs(a - b) for a, b in pairs]
        mine["compared"], mine["difference"] = len(apart), max(apart, default=math.inf)
        if not (len(apart) == COMPARED and mine["difference"] <= EQUAL):
            mine["status"] = "refused"
            mine["reason"] = (
                f"losses {mine['losses']}, those of {turn.row.base}: {base.get('losses')}"
            )
            turns.remove(turn)


def _count(turn: Turn) -> list[dict[str, Any]]:
    """Count the calls of each step on all ranks, twice; `same` says whether both times agree."""
    steps = turn.row.period
    turn.run(steps)  # from the first steps, whose results were waited for, to one that repeats
    twice = []
    for _ in range(2):
        counting = Counting()
        turn.run(steps, counting)
        twice.append(counting.counts(steps))
    return _gather(twice[1] | {"same": twice[0] == twice[1]})


def _steps_of_block(turn: Turn, plan: Plan) -> int:
    """Choose how many steps a block has, from the time of the hand-written loop's."""
    clock = Clock()
    turn.run(3, clock)
    steps = max(1, round(plan.seconds / (clock.wall / 3)))
    return _gather(steps if steps < LOG_EVERY else steps // LOG_EVERY * LOG_EVERY)[0]


def _time(
    turns: list[Turn], found: dict[str, dict[str, Any]], blocks: int, steps: int, rounds: int
) -> None:
    """Time the rows, which take `rounds` turns in each block, each time in another order.

    `cpu_us` is of a step, the mean over the ranks; `wall_us` is the slowest rank's. A row that
    repeats after more steps than its turn has makes as many. The first steps of a turn are not
    timed: they find the caches as another row left them, as no step of a run does."""
    for turn in turns:
        found[turn.row.name] |= {"cpu_us": [], "wall_us": []}
    for block in range(blocks):
        clocks = [_time_round(turns, steps // rounds, block * rounds + i) for i in range(rounds)]
        for turn, *of_turn in zip(turns, *clocks, strict=True):
            cpu, wall = (statistics.fmean(us) for us in zip(*of_turn, strict=True))
            ranks = _gather((cpu, wall))
            found[turn.row.name]["cpu_us"].append(statistics.fmean(cpu for cpu, _ in ranks))
            found[turn.row.name]["wall_us"].append(max(wall for _, wall in ranks))


def _time_round(turns: list[Turn], steps: int, seed: int) -> list[tuple[float, float]]:
    """Let each row make its steps; return the CPU and wall microseconds of one on this rank."""
    clocks = [Clock() for _ in turns]
    made = [-(-steps // turn.row.period) * turn.row.period for turn in turns]
    order = list(range(len(turns)))
    random.Random(seed).shuffle(order)
    for i in order:
        if dist.is_initialized():
            dist.barrier()
        turns[i].run(min(LOG_EVERY, made[i]))
        turns[i].run(made[i], clocks[i])
    return [(c.cpu / n * 1e6, c.wall / n * 1e6) for c, n in zip(clocks, made, strict=True)]


if __name__ == "__main__":
    main()
