"""Measures stratablk against qemu-storage-daemon and the limits of the machine in one interleaved run; started by
scripts/bench."""
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import disk
import host
import hot
import layers
import lifecycle
import plot
import snapshots
import system
from backends import Failed
from measure import Bench
from table import render, render_markdown

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# How long to wait for a machine that was busy and no longer is.
CALM_SECONDS = 150
# In the order in which they run.
GROUPS = {
    "hot": hot.group_hot,
    "depth": layers.group_depth,
    "chain": layers.group_chain,
    "first-write": layers.group_first_write,
    "bytes": snapshots.group_bytes,
    "timeline": snapshots.group_timeline,
    "gap": snapshots.group_gap,
    "flush": disk.group_flush,
    "cold": disk.group_cold,
    "scale": system.group_scale,
    "quiet": system.group_quiet,
    "cache": system.group_cache,
    "tables": system.group_tables,
    "lifecycle": lifecycle.group_lifecycle,
}


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="only these groups of cases (see --list)")
    parser.add_argument("--pairs", type=int, help="pairs of runs a case (7)")
    parser.add_argument("--seconds", type=float, help="length of a run (0.7)")
    parser.add_argument("--quick", "--smoke", action="store_true",
                        help="every case once and briefly, on any machine; the figures mean nothing and are not judged")
    parser.add_argument("--only", metavar="GROUP", action="append", help="only this group of cases (see --list)")
    parser.add_argument("--list", action="store_true", help="show the groups and stop")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/dev/shm"),
                        help="where the disks are kept meanwhile (/dev/shm)")
    parser.add_argument("--disk-dir", type=pathlib.Path, default=ROOT / "target" / "bench" / "disk",
                        help="where the disks of cases are kept that need a real one (target/bench/disk)")
    parser.add_argument("--bin-dir", type=pathlib.Path, help="programs that are there already, instead of building")
    parser.add_argument("--load-cpu", type=int, default=0, help="the load generator's CPU (0)")
    parser.add_argument("--server-cpu", type=int, default=1, help="the back-ends' CPU (1)")
    parser.add_argument("--seed", type=int, default=1, help="everything random follows from it (1)")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--strict", action="store_true", help="exit 4 if a target is missed")
    parser.add_argument("--self-check", action="store_true",
                        help="qemu-storage-daemon on both sides: every ratio should be close to 1")
    arguments = parser.parse_args()
    arguments.only = [*(arguments.only or ()), *arguments.groups]
    return arguments


def busy(arguments):
    """Why this machine is not fit to measure on now."""
    watch = host.Watch([])
    watch.start()
    heaviest = host.heaviest(seconds=0.1 if arguments.quick else 2.0)
    others, steal = watch.stop()
    reasons = host.why_busy(others, steal, os.getloadavg()[0], os.cpu_count())
    for cpu in (arguments.load_cpu, arguments.server_cpu):
        if cpu not in os.sched_getaffinity(0):
            raise Failed(f"there is no CPU {cpu}; choose with --load-cpu and --server-cpu")
    if arguments.load_cpu == arguments.server_cpu:
        reasons.append("load and back-end share one CPU")
    if reasons:
        reasons += [f"process {pid} ({name}) uses {share:.0%} of a CPU" for share, pid, name in heaviest if share > 0.02]
    return reasons


def busy_for_long(arguments):
    """As `busy`, but lets the load of the last minute fall if it is all that remains, of a build as a rule."""
    deadline = time.monotonic() + CALM_SECONDS
    while True:
        reasons = busy(arguments)
        only_past = len(reasons) > 0 and all(reason.startswith(("the load of", "process ")) for reason in reasons)
        if arguments.quick or arguments.force or not only_past or time.monotonic() > deadline:
            return reasons
        print("waiting for the load of the last minute to fall", flush=True)
        time.sleep(10)


def refuse(arguments, scale, work):
    """Why it cannot run at all, and with which exit code; None if it can."""
    unknown = set(arguments.only or ()) - set(GROUPS)
    if unknown:
        return 2, f"no group named {', '.join(sorted(unknown))}; --list shows them"
    free = shutil.disk_usage(work).free
    if free < scale.room():
        return 1, (f"{arguments.dir} has {free >> 20} MiB, {scale.room() >> 20} are needed; choose another place with --dir")
    return None


def said(group):
    """What a group says of itself, on one line."""
    return re.sub(r"\s+", " ", group.__doc__)


def run_groups(bench):
    """Everything that was asked for."""
    for name, group in GROUPS.items():
        if bench.arguments.only and name not in bench.arguments.only:
            continue
        print(f"{name}: {said(group)}", flush=True)
        began = time.monotonic()
        with contextlib.ExitStack() as inner:
            group(bench, inner)
        print(f"  ({time.monotonic() - began:.0f} s)", flush=True)


def main():
    """Everything; returns the exit code."""
    arguments = parse_arguments()
    if arguments.list:
        print("\n".join(f"{name:12}  {said(group)}" for name, group in GROUPS.items()))
        return 0
    # However it is ended, no back-end and no file stays.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        work = pathlib.Path(tempfile.mkdtemp(prefix="stratablk-bench.", dir=arguments.dir))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        bench = Bench(arguments, work, ROOT)
        stack.callback(bench.clean)
        refused = refuse(arguments, bench.scale, work)
        if refused:
            print(f"scripts/bench: {refused[1]}", file=sys.stderr)
            return refused[0]
        environment = host.environment(ROOT)
        print("\n".join(f"{key}: {value}" for key, value in environment.items()))
        print(f"seed: {arguments.seed}; {bench.scale.pairs} rounds of {bench.scale.seconds:g} s; disks in {work}; "
              f"load on CPU {arguments.load_cpu}, back-ends on CPU {arguments.server_cpu}")
        reasons = busy_for_long(arguments)
        if reasons and not arguments.quick:
            print("scripts/bench: this machine is busy, so the figures would mean nothing:", file=sys.stderr)
            print("\n".join(f"  {reason}" for reason in reasons), file=sys.stderr)
            if not arguments.force:
                print("Try again when it is idle, or give --force.", file=sys.stderr)
                return 3
        began = time.monotonic()
        run_groups(bench)
        return conclude(bench, environment, reasons, time.monotonic() - began)
    return 130


def conclude(bench, environment, reasons, seconds):
    """Prints and keeps the results; returns the exit code."""
    arguments = bench.arguments
    disturbed = [f"{record['group']}: {record['case']}" for record in bench.records if record["disturbed"]]
    quotable = not (reasons or arguments.quick or arguments.self_check or disturbed)
    print(f"\n{render(bench.rows)}\n")
    print(f"Outcomes: the median over {bench.scale.pairs} rounds of A/B (or A-B, or A) within each round; "
          f"{seconds:.0f} s; seed {arguments.seed}.")
    for note in bench.notes:
        print(f"Note: {note}.")
    missed = [row for row in bench.rows if row.is_missed()]
    judged = [row for row in bench.rows if row.target]
    if judged:
        print(f"{len(judged) - len(missed)} of {len(judged)} targets reached.")
    if arguments.quick or arguments.self_check:
        print("NOT TO BE QUOTED: a quick or checking run.")
    elif not quotable:
        print("NOT TO BE QUOTED: " + "; ".join(reasons + [f"disturbed: {case}" for case in disturbed]) + ".")
    save(bench, environment, quotable, reasons)
    return 4 if arguments.strict and missed else 0


def save(bench, environment, quotable, reasons):
    """Keeps every figure in target/bench."""
    directory = ROOT / "target" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    path = directory / f"{now}.json"
    path.write_text(json.dumps({
        "time": now, "command": sys.argv, "environment": environment, "quotable": quotable, "busy": reasons,
        "rounds": bench.scale.pairs, "seconds": bench.scale.seconds, "seed": bench.arguments.seed, "notes": bench.notes,
        "cases": bench.records,
    }, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(path, directory / "latest.json")
    (directory / "latest.md").write_text(render_markdown(bench.rows) + "\n", encoding="utf-8")
    plots = plot.draw(bench.records, directory)
    print(f"All figures: {path}" + (f"; plots: {directory}/{{{','.join(each.name for each in plots)}}}" if plots else ""))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        sys.exit(1)
