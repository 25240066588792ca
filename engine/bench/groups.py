"""Layers with windows beside layers without: requests that fit into the same bytes with one heap for all groups.

The model is like Gemma 3, five groups of layers with windows of 1,024 tokens to one of full attention, pages of 16
tokens. The rivals are a pool in which every layer keeps every token, and a fixed split with half of the bytes for full
attention and half for windows. Scheduler, rows, pages and prefix cache are the engine's own; the device only pretends.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import nan
from statistics import mean

from engine.bench.groups_designs import DESIGNS, GROUPS, PAGE_SIZE, STEP_TOKENS, WINDOW, WINDOWED_GROUPS
from engine.bench.groups_load import LoadResult, Traffic, run_load
from engine.bench.groups_sessions import RoundRobin, hit_rates, rival_hit_rates
from engine.bench.timing import print_table
from engine.terminal import count

SHORT, LONG = (256, 1_024, 1 / 4), (8_192, 24_576, 1 / 32)
MIXES = (Traffic("short", (SHORT,)), Traffic("long", (LONG,)), Traffic("both", (SHORT, LONG)))
ROUNDS = 10
SESSION_CONTEXTS = 3  # tokens of a session's context, as a multiple of --context
TIMES_AS_MANY, MOST_WASTE = 3.0, 0.04  # the bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--pages", type=count, default=61_440, help="pages of a group's layers in the memory")
    parser.add_argument(
        "--context", type=count, default=8_192, help="tokens of a request; a session has three times as many"
    )
    parser.add_argument("--steps", type=count, default=2_000, help="measured steps of each load")


def run(args: argparse.Namespace) -> None:
    """Prints the designs side by side for each load, and the rounds of the sessions."""
    units = args.pages // (2 * WINDOWED_GROUPS * GROUPS) * 2 * WINDOWED_GROUPS * GROUPS  # that each design can divide
    print(
        f"{units:,} pages of {PAGE_SIZE} tokens for one group each, or {units // GROUPS:,} for all layers; "
        f"{WINDOWED_GROUPS} groups with a window of {WINDOW:,} to 1 of full attention; "
        f"up to {STEP_TOKENS:,} tokens a step"
    )
    same = Traffic(f"{args.context:,} tokens", ((args.context, args.context, LONG[2]),))
    results = [[run_load(make, traffic, units, args.steps) for make in DESIGNS] for traffic in (same, *MIXES)]
    for traffic, of_designs in zip((same, *MIXES), results, strict=True):
        print_load(traffic, of_designs)
    claims = [times_as_many(results[0], args.context), *beaten(results[1:]), waste(results)]
    for goes_on in (True, False):
        robin = RoundRobin.filling(units, SESSION_CONTEXTS * args.context, ROUNDS, goes_on=goes_on)
        rates = hit_rates(robin, units), rival_hit_rates(robin, units)
        print_rounds(robin, units, *rates)
        claims.append(found(robin, *rates))
    print()
    for claim in claims:
        print(claim)


def print_load(traffic: Traffic, results: Sequence[LoadResult]) -> None:
    """Prints a table of the designs."""
    header = [f"requests: {traffic.name}", "running", "most", "ended per 1,000 steps", "retracted"]
    rows = [
        [
            each.name,
            f"{each.running:.1f}",
            str(each.most_running),
            f"{each.finished:.1f}",
            str(each.retractions),
            f"{each.waste:.2%}",
            f"{each.most_waste:.2%}",
            f"{each.free:.2%}",
        ]
        for each in results
    ]
    print()
    print_table([*header, "waste", "most waste", "free"], rows)


def times_as_many(results: Sequence[LoadResult], context: int) -> str:
    """How many times as many requests of one length run at once."""
    ours, plain, split = (each.running for each in results)
    return (
        f"{context:,} tokens: {ours / plain:.2f} times as many run at once as without groups (bar: {TIMES_AS_MANY:g}), "
        f"{ours / split:.2f} times as many as half and half"
    )


def beaten(results: Sequence[Sequence[LoadResult]]) -> list[str]:
    """How many times as many requests end as in the fixed split, for each mix."""
    return [
        f"{traffic.name}: {ours.finished / (split.finished or nan):.2f} times as many end as half and half (bar: 1)"
        for traffic, (ours, _, split) in zip(MIXES, results, strict=True)
    ]


def waste(results: Sequence[Sequence[LoadResult]]) -> str:
    """The largest waste of ours under any load."""
    ours = [of_designs[0] for of_designs in results]
    return (
        f"waste: {max(each.waste for each in ours):.2%} of the bytes in the mean of the worst load, "
        f"{max(each.most_waste for each in ours):.2%} at most (bar: {MOST_WASTE:.0%})"
    )


def print_rounds(robin: RoundRobin, units: int, ours: Sequence[float], split: Sequence[float]) -> None:
    """Prints how much of the sessions' tokens is found, round by round."""
    print(
        f"\n{robin.sessions} sessions in turn, which {kind_of(robin)}: up to {robin.longest:,} tokens each, whose "
        f"pages of full attention and last windows are {robin.needed_units / units:.0%} of all; found of their pages"
    )
    rows = [
        [name, *(f"{rate:.1%}" for rate in rates)]
        for name, rates in (("groups", ours), ("half and half, least recently used window pages go", split))
    ]
    print_table(["round", *(str(index + 1) for index in range(len(ours)))], rows)


def found(robin: RoundRobin, ours: Sequence[float], split: Sequence[float]) -> str:
    """How much of the sessions' tokens is found in all rounds."""
    return (
        f"sessions that {kind_of(robin)}: {mean(ours):.1%} found, {mean(split):.1%} half and half; "
        f"in the last round {ours[-1]:.1%} and {split[-1]:.1%}"
    )


def kind_of(robin: RoundRobin) -> str:
    """What the sessions do in a turn."""
    return "go on after the last answer" if robin.goes_on else "put another question to the same context"
