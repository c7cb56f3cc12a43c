"""What the benchmarks share: interleaved pairs, their spread, the shards they run on, and the result file.

A benchmark sets two contenders against each other. They take turns, and the one that begins changes from pair to pair,
so that whatever else the machine does falls on both; the figure is the median over the pairs of the ratio *within* a
pair. To add a benchmark: a file beside this one with `main(argv)`, and a section in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prima_ray.base import write_json
from prima_ray.data.schema import MANIFEST, read_manifest
from prima_ray.stages.rundir import git_commit, versions

REPOSITORY = Path(__file__).resolve().parents[1]
WORK = REPOSITORY / "runs" / "benchmarks"
CONFIGS = REPOSITORY / "jobs" / "configs"

Figures = dict[str, float]


def parser(doc: str | None, *, shards: bool = True) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--pairs", type=int, default=7, help="interleaved pairs (default %(default)s)")
    found.add_argument("--quick", action="store_true", help="a smoke run: two short pairs, no result file")
    found.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result file")
    if shards:
        found.add_argument("--shards", help="a shard folder; default: PAD-UFES-20 where it is, else phantoms")
    return found


def parse(found: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
    """Parse; ``--quick`` sets what is named here, unless the command line sets it."""
    if "--quick" in (sys.argv[1:] if argv is None else argv):
        found.set_defaults(**{"pairs": 2, **quick})
    return found.parse_args(argv)


# --------------------------------------------------------------------------------------------------- shards


def find_shards(named: str | None) -> tuple[str, str]:
    """(shard folder, name of its data set): the one named, PAD-UFES-20 where its photos are, else phantoms.

    What is not there yet is ingested into `runs/benchmarks`.
    """
    if named is None:
        shared = Path(os.environ.get("PRIMA_SHARED") or REPOSITORY.parent / "shared") / "data" / "pad_ufes_20"
        name = "pad_ufes_20" if (shared / "metadata.csv").exists() else "phantoms"
        finished = [
            folder for folder in (WORK.parent / name / "shards", WORK / name / "shards") if (folder / MANIFEST).exists()
        ]
        named = str(finished[0] if finished else _ingest(name, WORK / name))
    manifest = read_manifest(named)
    return named, f"{manifest.data_set.name}, {manifest.num_exams} exams"


def _ingest(name: str, folder: Path) -> Path:
    extra: list[str] = []
    if name == "phantoms":
        from prima_ray.data.phantoms import IMAGES, TABLE, PhantomConfig, write_phantoms

        raw = folder / "raw"
        write_phantoms(raw, PhantomConfig(image_side=256))
        extra = ["--set", f"source.table={raw / TABLE}", "--set", f"source.images={raw / IMAGES}"]
    out = folder / "shards"
    config = CONFIGS / name / "ingest.yaml"
    # A process of its own: the benchmark's own process may have to be free of Ray.
    command = [sys.executable, "-m", "prima_ray.cli", "ingest", str(config), "--set", f"out={out}", *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


# ---------------------------------------------------------------------------------------------------- pairs


@dataclass
class Pairs:
    """Figures of contenders that took turns: ``values[figure][contender]`` has one number a pair."""

    contenders: tuple[str, ...]
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, contender: str, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            by_contender = self.values.setdefault(figure, {name: [] for name in self.contenders})
            by_contender[contender].append(float(value))

    def ratios(self, figure: str, over: str, under: str) -> list[float]:
        """``over`` / ``under`` within each pair."""
        mine = self.values[figure]
        return [one / other for one, other in zip(mine[over], mine[under], strict=True)]

    def table(self) -> str:
        """Median (min..max) of every figure, a row a contender."""
        width = max(len(name) for name in self.contenders)
        lines = []
        for figure, by_contender in self.values.items():
            lines.append(figure)
            for name, values in by_contender.items():
                lines.append(
                    f"  {name:<{width}}  {statistics.median(values):>10.4g}  ({min(values):.4g}..{max(values):.4g})"
                )
        return "\n".join(lines)


def turns(contenders: Sequence[str], pairs: int) -> Iterator[tuple[int, str]]:
    """(pair, contender) in the order of the runs: the one that begins changes from pair to pair."""
    for pair in range(pairs):
        for name in contenders if pair % 2 == 0 else tuple(reversed(contenders)):
            yield pair, name


def interleave(contenders: Mapping[str, Callable[[int], Figures]], *, pairs: int) -> Pairs:
    """Run every contender once a pair, in turns; each is told the number of the pair."""
    found = Pairs(tuple(contenders))
    for pair, name in turns(found.contenders, pairs):
        figures = contenders[name](pair)
        found.add(name, figures)
        shown = ", ".join(f"{value:.4g} {figure}" for figure, value in figures.items())
        print(f"pair {pair + 1}/{pairs}: {name:<12} {shown}", file=sys.stderr, flush=True)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest, interquartile range, and the values themselves."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {
        "median": _short(statistics.median(values)),
        "min": _short(min(values)),
        "max": _short(max(values)),
        "iqr": [_short(low), _short(high)],
        "values": [_short(value) for value in values],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


# --------------------------------------------------------------------------------------------------- result


def report(
    name: str,
    arguments: argparse.Namespace,
    *,
    sections: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None,
) -> None:
    """Print tables and ratios, and write the result file unless the run was a quick one.

    Args:
        sections: a part of the benchmark ('' where there is one) -> `pairs` (Pairs), `ratio` (figure, over, under) and
            whatever else belongs into the file.
    """
    written: dict[str, Any] = {}
    for title, section in sections.items():
        pairs: Pairs = section["pairs"]
        figure, over, under = section["ratio"]
        ratios = pairs.ratios(figure, over, under)
        print(f"\n{title}".rstrip() + f"\n{pairs.table()}")
        for key, value in section.items():
            if key not in ("pairs", "ratio", "setting"):
                print(f"{key}: {value}")
        print(f"{over} / {under}, {figure}")
        median = statistics.median(ratios)
        print(f"ratio: {median:.3f} ({min(ratios):.3f}..{max(ratios):.3f} of {len(ratios)} pairs)", flush=True)
        written[title or name] = {
            "ratio": {"of": f"{figure}: {over} / {under}", **spread(ratios)},
            "figures": {
                key: {contender: spread(values) for contender, values in by_contender.items()}
                for key, by_contender in pairs.values.items()
            },
            **{key: value for key, value in section.items() if key not in ("pairs", "ratio")},
        }
    if arguments.quick:
        print("quick: nothing was written", file=sys.stderr)
        return
    path = arguments.out / f"{name}.json"
    write_json(path, {"benchmark": name, **circumstances(name, argv), **written})
    print(f"written: {os.path.relpath(path)}", file=sys.stderr)


def circumstances(name: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """When, by which command, on what machine and with which versions a figure came about."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{name}.py", *_portable(sys.argv[1:] if argv is None else argv)]),
        "machine": {
            "cpu": _cpu_model(),
            "num_cpus": os.cpu_count(),
            "load_average_at_the_end": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _portable(argv: Sequence[str]) -> list[str]:
    """Arguments without the paths of this machine."""
    return [
        os.path.relpath(item, REPOSITORY) if os.path.isabs(item) and Path(item).is_relative_to(REPOSITORY) else
        Path(item).name if os.path.isabs(item) else item
        for item in argv
    ]  # fmt: skip


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
