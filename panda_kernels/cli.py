"""``panda-kernels info | verify | encode | autotune``: arguments and exit codes; the work is in the module of each."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import encode, info, verify
from .backends import BackendError, status
from .tuning import autotune


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="panda-kernels", description="Kernels for the visual path of Video-Panda.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_verify(commands)
    _add_encode(commands)
    _add_autotune(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all went well, 1 if some of it failed, 2 if it could not be carried out."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"panda-kernels {args.command}: interrupted", file=sys.stderr)
        return 130


Commands = argparse._SubParsersAction


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser("info", help="versions, machine and backends: everything a bug report needs")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    return info.main(args.json)


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="check this installation's results against float64")
    verify.add_arguments(parser)
    parser.set_defaults(run=verify.main)


def _add_encode(commands: Commands) -> None:
    parser = commands.add_parser(
        "encode",
        help="videos to tokens, one safetensors file each",
        description="Turn videos into tokens, one safetensors file each. Run again after an interruption: "
        "outputs that are complete for the same settings are left alone.",
    )
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="video files, and folders to search")
    parser.add_argument("-o", "--out", required=True, type=Path, help="folder for the outputs, made if missing")
    parser.add_argument("--weights", type=Path, help="checkpoint; without one the weights are random")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument("--projector", action="store_true", help="apply the checkpoint's projector to the tokens")
    parser.add_argument("--frames", type=_frames, default=8, help="frames a video, a multiple of 4 (default: 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--backend", default="auto", help="see 'panda-kernels info' (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.set_defaults(run=_encode, parser=parser)


def _add_autotune(commands: Commands) -> None:
    parser = commands.add_parser(
        "autotune",
        help="measure the kernels' settings on this machine",
        description="Time the settings that each kernel declares, on a machine that does nothing else, and keep those "
        "that are faster than its heuristic. Later calls find them; docs/design.md says how.",
    )
    autotune.add_arguments(parser)
    parser.set_defaults(run=autotune.main)


def _frames(text: str) -> int:
    try:
        frames = int(text)
    except ValueError:
        frames = 0
    if frames < 1 or frames % 4:
        raise argparse.ArgumentTypeError(f"expected a multiple of 4, got {text}")
    return frames


def _encode(args: argparse.Namespace) -> int:
    backends = status()
    if args.backend != "auto" and backends.get(args.backend, "no such backend"):
        reason = backends.get(args.backend, f"no such backend; there are {', '.join(('auto', *backends))}")
        args.parser.error(f"--backend {args.backend}: {reason}")
    if args.projector and args.weights is None:
        args.parser.error("--projector: needs --weights that hold one")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = encode.load_model(
            args.weights,
            seed=args.seed,
            dtype=getattr(torch, args.dtype),
            device=device,
            backend=args.backend,
            projector=args.projector,
        )
        if args.weights is None:
            print(f"weights: {model.weights}. The tokens mean nothing; give --weights for real ones.", file=sys.stderr)
        return 1 if encode.encode_videos(args.videos, args.out, model, frames=args.frames) else 0
    except (ImportError, OSError, KeyError, ValueError, BackendError) as error:
        print(f"panda-kernels encode: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
