"""What the measurements on a bed share: programs, options, failures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from bench.bed import Network
from cli.demo.nat import Kind
from cli.demo.netns import CommandError
from cli.demo.pair import PairError

PROGRAMS = ("ip", "nft", "conntrack", "ss", "ssh", "dumpcap")
Failures = (PairError, CommandError, RuntimeError, OSError)  # of a bed; a fresh one may do


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What the wires and NATs are like."""
    parser.add_argument("--rtt", type=float, default=20.0, metavar="MS", help="default 20")
    parser.add_argument(
        "--loss", type=float, default=0.0, metavar="PERCENT", help="on each wire, each way"
    )
    parser.add_argument(
        "--jitter", type=float, default=0.0, metavar="MS", help="uniform, on each wire, each way"
    )
    parser.add_argument(
        "--keep-order", action="store_true", help="jitter does not change the order of packets"
    )
    parser.add_argument("--family", type=int, choices=(4, 6), default=4, help="outside the tunnel")
    parser.add_argument("--inner", type=int, choices=(4, 6), default=4, help="inside the tunnel")
    parser.add_argument("--nat", choices=get_args(Kind), default="full-cone", help="A's NATs")


def network(options: argparse.Namespace) -> Network:
    """From the options above."""
    return Network(
        rtt=options.rtt / 1000,
        loss=options.loss / 100,
        jitter=options.jitter / 1000,
        ordered=options.keep_order,
        family=options.family,
        inner=options.inner,
        nat=options.nat,
    )


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options for JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
