"""`prima`: the stages on a config, and what is done with their results.

Exit codes: 0 done; 2 the user's mistake, said in one or two lines; 1 ours, with a traceback. Logs and progress go to
stderr; a stage's last line on stdout is `run: PATH`. To add a stage: one line in `stages.registry`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from prima_ray import __version__
from prima_ray.base import PrimaError, is_disk_full
from prima_ray.config import dump_config, load_config
from prima_ray.stages.registry import STAGES, config_class, load_stage
from prima_ray.training.checks.storage import refuse_lost
from prima_ray.training.cluster import disconnect


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `prima` command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        with _stoppable():
            code: int = arguments.run(arguments)
    except PrimaError as error:
        # Not before Ray's processes are done with stderr: the reason is the last line.
        disconnect()
        _say(f"prima: {error}")
        return 2
    except KeyboardInterrupt as stop:
        disconnect()
        is_stopped = "SIGTERM" in stop.args
        _say(f"prima: {'stopped' if is_stopped else 'interrupted'}; the same command continues where it can")
        return 143 if is_stopped else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_disk_full(error):
            raise
        disconnect()
        _say(f"prima: the disk is full, or a quota or limit on files is reached ({_last_line(error)})")
        _say("  Make room and run the same command again: it continues where it can.")
        return 2
    return code


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM (`ray job stop`, Kubernetes, a batch system) ends a command as Ctrl-C does: locks and workers go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, is_stopped = signal.getsignal(signal.SIGTERM), False

    def stop(_: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True
        # Whoever handles Ctrl-C now: Ray Train brings its workers down first. Called, not raised: in a job of Ray's
        # SIGINT is blocked.
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*["SIGTERM"] * is_stopped) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stage_from_argv(stage: str, argv: Sequence[str] | None = None) -> int:
    """What `jobs/<stage>.py` does: the same arguments as `prima <stage>`."""
    return main([stage, *(sys.argv[1:] if argv is None else argv)])


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="prima", description="Diagnosis from images and clinical metadata, on Ray.")
    parser.add_argument("--version", action="version", version=f"prima_ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage, (_, _, summary) in STAGES.items():
        command = commands.add_parser(stage, help=summary, description=summary)
        _add_config_arguments(command)
        command.set_defaults(run=_run_stage, stage=stage)

    command = commands.add_parser("config", help="print what a stage would run, resolved")
    command.add_argument("stage", choices=STAGES)
    _add_config_arguments(command)
    command.set_defaults(run=_run_config)

    _add_evaluation(commands)

    summary = "variants x folds x seeds of whole pipelines -> one table, with a verdict a claim"
    command = commands.add_parser("study", help=summary, description=summary)
    _add_config_arguments(command)
    command.add_argument(
        "--final", metavar="RUN", help="then train ours on every fold, calibrated by the answers of the folds' models"
    )
    command.add_argument("--so-far", action="store_true", help="train nothing: the page of what is finished already")
    command.set_defaults(run=_run_study)

    command = commands.add_parser("predict", help="diagnose one exam, or all exams of a shard folder")
    command.add_argument("run_dir", metavar="RUN", help="the run directory of `prima fuse` or `prima finetune`")
    command.add_argument("--shards", help="a shard folder: every exam in it")
    command.add_argument("--out", help="with --shards: the Parquet file to write")
    command.add_argument("--image", action="append", default=[], help="a photo of the exam; repeatable")
    command.add_argument("--metadata", help="the exam's attributes: JSON, or a file that holds it")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--explain", metavar="FOLDER", help="say what the answer rests on; pictures go into the folder"
    )
    command.set_defaults(run=_run_predict)

    _add_serving(commands)

    command = commands.add_parser("vet", help="accept, reject or edit the entries of a risk corpus")
    command.add_argument("corpus", metavar="CORPUS", help="the run directory of `prima corpus`")
    command.add_argument("--host", default="127.0.0.1", help="where the review page listens (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8710, help="its port; 0 takes a free one (default 8710)")
    command.add_argument("--reviewer", default="", help="your name")
    command.add_argument("--export", metavar="FILE.csv", help="write a spreadsheet instead of serving the page")
    command.add_argument(
        "--import", dest="import_", metavar="FILE", help="take over a spreadsheet, or an earlier corpus's vetting.jsonl"
    )
    command.set_defaults(run=_run_vet)

    command = commands.add_parser("fetch", help="bring model weights into a folder, for machines with no network")
    command.add_argument("names", nargs="+", metavar="NAME", help="a timm or transformers model, or a local folder")
    command.add_argument("--to", required=True, help="the folder")
    command.add_argument("--verify", action="store_true", help="only compare what is there with its checksums")
    command.set_defaults(run=_run_fetch)

    command = commands.add_parser("doctor", help="what would keep a stage from running, and how to mend it")
    command.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a stage's YAML, or a run directory; none: this machine"
    )
    command.add_argument("--stage", choices=STAGES, help="whose config it is, where its name or keys do not say")
    _add_overrides(command)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_run_doctor)

    command = commands.add_parser("demo", help="all stages on generated data, in a few minutes")
    command.add_argument("--out", default="runs/demo", help="folder of everything it makes (default runs/demo)")
    command.set_defaults(run=_run_demo)
    return parser


def _add_evaluation(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="score a run beside the metadata-only baselines")
    command.add_argument("run_dir", metavar="RUN", help="the run directory of `prima fuse` or `prima finetune`")
    command.add_argument("--out", help="folder of the report (default RUN/evaluation)")
    command.add_argument(
        "--shards", help="where the run's shards are now, if they were moved; with --mapping another data set's"
    )
    command.add_argument("--mapping", metavar="FILE.yaml", help="how the other data set is read as the run's own")
    command.add_argument(
        "--explanations", action="store_true", help="check explanations on some exams, and show examples of answers"
    )
    command.add_argument("--robustness", action="store_true", help="ask about altered exams as well, a pass each")
    command.add_argument("--config", metavar="FILE.yaml", help="what is looked at: subgroups, specificities, ...")
    _add_overrides(command)
    command.set_defaults(run=_run_evaluate)

    command = commands.add_parser("compare", help="several runs beside each other on the exams that they share")
    command.add_argument("run_dirs", nargs="+", metavar="RUN", help="run directories; the first is ours")
    command.add_argument("--out", default="comparison", help="folder of the report (default comparison)")
    command.add_argument("--shards", help="where the runs' shards are now, if they were moved")
    command.add_argument("--config", metavar="FILE.yaml", help="what is looked at")
    _add_overrides(command)
    command.set_defaults(run=_run_compare)


def _add_serving(commands: Any) -> None:
    command = commands.add_parser("serve", help="a run as an endpoint over HTTP, and a page at /")
    command.add_argument("run_dir", metavar="RUN", help="the run directory of `prima fuse` or `prima finetune`")
    command.add_argument("--host", default="127.0.0.1", help="the interface that it listens on (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="its port; 0 takes a free one (default 8000)")
    command.add_argument("--api-keys", metavar="FILE", help="who may ask, see `prima keys`; needed off loopback")
    command.add_argument("--config", metavar="FILE", help="limits, batching, scaling: a YAML file")
    _add_overrides(command)
    command.set_defaults(run=_run_serve)

    command = commands.add_parser("keys", help="make an API key for `prima serve`; it is shown once")
    command.add_argument("file", metavar="FILE", help="the file that its hash is added to")
    command.add_argument("--add", required=True, metavar="NAME", help="whose key it is")
    command.set_defaults(run=_run_keys)


def _add_config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file, such as those of jobs/configs")
    _add_overrides(command)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of it: --set optimizer.lr=1e-4; repeatable",
    )


def _run_stage(arguments: argparse.Namespace) -> int:
    config, run = load_stage(arguments.stage, arguments.config, arguments.overrides)
    refuse_lost(getattr(config, "out", ""))
    _answer(run, config)
    return 0


def _run_config(arguments: argparse.Namespace) -> int:
    config, _ = load_stage(arguments.stage, arguments.config, arguments.overrides)
    sys.stdout.write(dump_config(config))
    return 0


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.evaluate import EvaluateConfig, run_evaluate

    switch = [f"{part}.enabled=true" for part in ("robustness", "explanations") if getattr(arguments, part)]
    config = load_config(EvaluateConfig, arguments.config, [*arguments.overrides, *switch])
    options = {"out": arguments.out, "shards": arguments.shards, "mapping": arguments.mapping}
    _answer(run_evaluate, arguments.run_dir, config=config, **options)
    return 0


def _run_compare(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.compare import CompareConfig, run_compare

    config = load_config(CompareConfig, arguments.config, arguments.overrides)
    _answer(run_compare, arguments.run_dirs, out=arguments.out, shards=arguments.shards, config=config)
    return 0


def _run_study(arguments: argparse.Namespace) -> int:
    from prima_ray.studies.config import StudyConfig
    from prima_ray.studies.final import check_final, train_final
    from prima_ray.studies.run import run_study, study_so_far

    config = load_config(StudyConfig, arguments.config, arguments.overrides)
    if arguments.final and arguments.so_far:
        raise PrimaError("--final trains, --so-far trains nothing", mend="Give one of them.")
    if arguments.final:
        check_final(config, arguments.final)
    _answer(study_so_far if arguments.so_far else run_study, config)
    if arguments.final:
        _answer(train_final, config, arguments.final)
    return 0


def _run_predict(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.predict import run_predict

    return run_predict(
        arguments.run_dir,
        shards=arguments.shards,
        out=arguments.out,
        images=arguments.image,
        metadata=arguments.metadata,
        as_json=arguments.json,
        explain=arguments.explain,
    )


def _run_serve(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.serve import run_serve

    _answer(
        run_serve,
        arguments.run_dir,
        host=arguments.host,
        port=arguments.port,
        api_keys=arguments.api_keys,
        config=arguments.config,
        overrides=arguments.overrides,
    )
    return 0


def _run_keys(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.serve import run_keys

    print(run_keys(arguments.file, add=arguments.add))  # noqa: T201 - the command's answer
    return 0


def _run_vet(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.vet import run_vet

    _answer(
        run_vet,
        arguments.corpus,
        host=arguments.host,
        port=arguments.port,
        reviewer=arguments.reviewer,
        export=arguments.export,
        import_=arguments.import_,
    )
    return 0


def _run_fetch(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.fetch import run_fetch

    return run_fetch(arguments.names, to=arguments.to, verify=arguments.verify)


def _run_doctor(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.doctor import run_doctor

    schemas = {name: config_class(name) for name in STAGES}
    with contextlib.redirect_stdout(sys.stderr):
        report = run_doctor(arguments.config, arguments.overrides, stage=arguments.stage, schemas=schemas)
    print(report.to_json() if arguments.json else report.to_text())  # noqa: T201 - the command's answer
    return 2 if report.count("error") else 0


def _run_demo(arguments: argparse.Namespace) -> int:
    from prima_ray.stages.demo import run_demo

    _answer(run_demo, arguments.out)
    return 0


def _answer(run: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Run, then name the run directory on stdout, where nothing else goes: Ray's driver prints there unasked."""
    with contextlib.redirect_stdout(sys.stderr):
        out = run(*arguments, **options)
    print(f"run: {out}")  # noqa: T201 - the command's answer


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - stderr is where messages go


def _quiet_libraries() -> None:
    """Messages of ours at INFO, of libraries at WARNING, all on stderr."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("prima_ray").setLevel(logging.INFO)
    # Hubs are asked only where a config says so by name; a progress bar a file is noise in a job's log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
