"""Run a model's folder of YAMLs: every stage in order; what is up to date is skipped, what was stopped goes on.

    python -m recipes.run recipes/querit-nano --dry-run
    python -m recipes.run recipes/querit-nano [--from STAGE] [--only STAGE] [--accelerate FILE]

A stage is a YAML file; its name tells the script that reads it (recipes.lib.stages), and its `output` or `output_dir`
is what it makes. A stage whose config names another's output comes after it; file names settle the rest. Beside each
output stands a record of its config, code and inputs (recipes.lib.records): a stage runs where one of them changed,
or the output did. What it then replaces is moved into `old/` beside the output, never deleted. Paths are relative to
the current folder. To make an output anew, delete it.
"""

import argparse
import importlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from querit.files import content_hash, read_record, write_record
from recipes.lib.estimates import Estimate, estimate, in_words
from recipes.lib.records import difference, move_aside
from recipes.lib.stages import ARGUMENTS, Stage, is_within, read_stages

REUSING = ("evaluate",)  # what it has measured is stored under all that it depends on: another config may build on it
LIBRARIES = ("torch", "transformers", "trl", "sentence-transformers", "datasets", "accelerate")


@dataclass
class Plan:
    why: str
    runs: bool = False
    lacks: list[str] = field(default_factory=list)  # what must be there first, each with the way to get it


def choose(stages: list[Stage], start: str | None, only: str | None) -> list[str]:
    """Names of the stages from `start` on, or of `only` one."""
    names = [stage.name for stage in stages]
    for name in (start, only):
        if name and name not in names:
            raise ValueError(f"There is no stage {name}; there are {', '.join(names)}.")
    if only:
        return [only]
    return names[names.index(start) :] if start else names


def state_of(stage: Stage) -> tuple[str | None, bool]:
    """(why the stage must run, or None; whether what stands of its output is of use to it)."""
    record = read_record(stage.output)
    if record is None:
        return ("there is an output, but no record of how it was made" if stage.output.exists() else "never run"), False
    now = stage.fingerprint()
    changed = difference(record, now)
    useful = not changed or (stage.script in REUSING and record["code"] == now["code"])
    if record["state"] == "started":
        return f"was stopped, and begins anew: {changed}" if changed else "was stopped, and goes on", useful
    if changed:
        return changed, useful
    if not stage.output.exists():
        return "output is gone", False
    if content_hash(stage.output) != record["output"]:
        return "output is not what was written", False
    return None, True


def lacking(path: str, stage: Stage, stages: list[Stage], plans: dict[str, Plan]) -> str | None:
    """What keeps a stage from reading an input, and how to mend it, given the plans of those before it."""
    maker = next((other for other in stages if other.name in stage.after and is_within(path, other.output)), None)
    if maker and maker.name in plans and (plans[maker.name].runs or plans[maker.name].lacks):
        return f"{path} is made by {maker.name}, which cannot run" if plans[maker.name].lacks else None
    if maker and (read_record(maker.output) or {}).get("state") == "started":
        return f"{path} is unfinished: run --only {maker.name} first"
    if Path(path).exists():
        return None
    if maker and maker.name not in plans:
        return f"{path} is missing: run --only {maker.name} first"
    return (
        f"{path} is missing: put it there ({stage.path.parent}/README.md says where it is from) or change {stage.path}"
    )


def plan(stages: list[Stage], chosen: list[str]) -> dict[str, Plan]:
    """What would happen to each of the chosen stages, and why."""
    plans: dict[str, Plan] = {}
    for stage in stages:
        if stage.name not in chosen:
            continue
        lacks = [lack for path in stage.inputs if (lack := lacking(path, stage, stages, plans))]
        before = [name for name in stage.after if name in plans and plans[name].runs]
        if lacks:
            plans[stage.name] = Plan("cannot run", lacks=lacks)
        elif why := state_of(stage)[0]:
            plans[stage.name] = Plan(why, runs=True)
        elif before:
            plans[stage.name] = Plan(f"if {', '.join(before)} brings a change", runs=True)
        else:
            plans[stage.name] = Plan("up to date")
    return plans


def show(stages: list[Stage], plans: dict[str, Plan], estimates: dict[str, Estimate]) -> str:
    """The plan as a table, with estimates of what would run."""
    width = max(map(len, plans))
    lines, seconds, dollars = [], 0.0, 0.0
    for stage in stages:
        if stage.name not in plans:
            continue
        state, guess = plans[stage.name], estimates[stage.name]
        action = "run" if state.runs else "no" if state.lacks else "skip"
        size = f"{guess.items:,} {guess.unit}" if guess.items is not None else "?"
        cost = in_words(guess.seconds, guess.dollars) if state.runs else ""
        lines.append(f"{action:4}  {stage.name:{width}}  {size:>22}  {cost:>20}  {state.why}")
        lines += [f"      {'':{width}}  {lack}" for lack in state.lacks]
        if state.runs:
            seconds, dollars = seconds + (guess.seconds or 0), dollars + (guess.dollars or 0)
    sources = sorted({guess.source for n, guess in estimates.items() if plans[n].runs and guess.seconds is not None})
    if sources:
        lines.append(f"in all {in_words(seconds, dollars)}, an estimate: {'; '.join(sources)}")
    return "\n".join(lines)


def check_keys(stage: Stage) -> None:
    """ValueError for a key that the stage's script does not know, or a required one that is not there."""
    module = importlib.import_module(f"recipes.{stage.script}")
    known = [f for name in ARGUMENTS[stage.script] for f in fields(getattr(module, name)) if f.init]
    required = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    names = {f.name for f in known}
    if unknown := sorted(stage.config.keys() - names - {"env"}):  # env: variables that TrlParser sets
        raise ValueError(f"{stage.path}: unknown keys {', '.join(unknown)}; recipes.{stage.script} --help lists all.")
    if absent := sorted(required - stage.config.keys()):
        raise ValueError(f"{stage.path}: {', '.join(absent)} must be given.")


def launch(stage: Stage) -> None:
    """Run a stage's script as a process of its own. RuntimeError if it fails."""
    command = ["-m", f"recipes.{stage.script}", "--config", str(stage.path)]
    if stage.accelerate:
        command = ["-m", "accelerate.commands.launch", "--config_file", stage.accelerate, *command]
    print(f"$ python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        raise RuntimeError(f"{stage.name} failed ({code}): see above. The same command goes on from where it stopped.")


def launch_here(stage: Stage) -> None:
    """Run a stage's script in this process."""
    from trl import TrlParser

    module = importlib.import_module(f"recipes.{stage.script}")
    main = getattr(module, "main", None) or module.evaluate
    parser = TrlParser([getattr(module, name) for name in ARGUMENTS[stage.script]])
    main(*parser.parse_args_and_config(["--config", str(stage.path)], fail_with_unknown_args=True))


def run_stage(stage: Stage, stages: list[Stage], start: Callable[[Stage], None] = launch) -> bool:
    """Run one stage and record it, unless it is up to date. What stands there of other settings is moved aside."""
    why, useful = state_of(stage)
    if why is None:
        print(f"{stage.name}: up to date", flush=True)
        return False
    if not useful and (aside := move_aside(stage.output, [other.output for other in stages])):
        print(f"{stage.name}: what stood at {stage.output} is in {aside} now", flush=True)
    record = stage.fingerprint() | {"stage": stage.name, "script": stage.script, "state": "started"}
    write_record(stage.output, record)
    began = time.monotonic()
    start(stage)
    if not stage.output.exists():
        raise RuntimeError(f"{stage.name} ended without making {stage.output}.")
    # A rate is read off unbroken runs only.
    seconds = None if useful else round(time.monotonic() - began, 1)
    finish(stage, record, seconds)
    return True


def finish(stage: Stage, record: dict, seconds: float | None) -> None:
    done = {
        "state": "done",
        "output": content_hash(stage.output),
        "items": estimate(stage, [stage]).items,
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    write_record(stage.output, record | done)


def adopt(stage: Stage) -> None:
    """Record an output that stands there as the present config's, code's and inputs'."""
    finish(stage, stage.fingerprint() | {"stage": stage.name, "script": stage.script, "adopted": True}, None)


def run(stages: list[Stage], chosen: list[str], start: Callable[[Stage], None] = launch) -> list[str]:
    """Run what needs to run of the chosen stages. -> their names. Stages that lack an input are left out."""
    plans = plan(stages, chosen)
    # Each is looked at again when its turn comes: what ran before it may have brought no change.
    return [s.name for s in stages if s.name in plans and plans[s.name].runs and run_stage(s, stages, start)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.run", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of YAML files, one a stage")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="leave the stages before this one as they are")
    parser.add_argument("--only", metavar="STAGE", help="this stage alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and why, and run nothing")
    parser.add_argument("--accelerate", metavar="FILE", help="train under `accelerate launch --config_file FILE`")
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="run nothing; record the outputs that stand there as up to date (made by hand, or the change is none)",
    )
    args = parser.parse_args()
    try:
        stages = read_stages(args.folder, args.accelerate)
        chosen = choose(stages, args.start, args.only)
        if args.adopt:
            for stage in stages:
                if stage.name in chosen and stage.output.exists() and state_of(stage)[0]:
                    adopt(stage)
                    print(f"{stage.name}: {stage.output} is taken as it stands")
            return
        plans = plan(stages, chosen)
        print(show(stages, plans, {name: guess for name, guess in all_estimates(stages).items() if name in plans}))
        if args.dry_run:
            return
        # In a process of its own: the scripts bring torch along, which need not stay in memory for hours.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            list(pool.map(check_keys, [stage for stage in stages if stage.name in plans and plans[stage.name].runs]))
        run(stages, chosen)
        if lacking := [name for name, state in plans.items() if state.lacks]:
            raise ValueError(f"not run for want of inputs (see the list at the top): {', '.join(lacking)}")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


def all_estimates(stages: list[Stage]) -> dict[str, Estimate]:
    return {stage.name: estimate(stage, stages) for stage in stages}


if __name__ == "__main__":
    main()
