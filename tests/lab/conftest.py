"""Fixtures of the lab: worlds and scenarios that keep what they saw when their test fails."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.nat.place import Place
from cli.demo.world import World
from tests.lab.hosts import Host, two_hosts
from tests.lab.scenario import Scenario, requirements

_SCENARIOS = pytest.StashKey[list[Scenario | Place]]()
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a lab test, and is skipped with the reason where the lab
    cannot run.
    """
    mine = [item for item in items if item.path.is_relative_to(_HERE)]
    reason = requirements() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.lab)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"lab: {reason}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the scenarios of a test that it failed, and name their directories in the failure."""
    report = yield
    if report.failed:
        for scenario in item.stash.get(_SCENARIOS, []):
            scenario.failed = True
            report.sections.append(("artifacts", str(scenario.directory)))
    return report


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    """Build worlds (arguments of `World`) that are removed after the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(World(**options))


@pytest.fixture
def make_scenario(request: pytest.FixtureRequest) -> Iterator[Callable[..., Scenario]]:
    """Build scenarios (arguments of `Scenario` but the name), named after the test."""
    made = request.node.stash.setdefault(_SCENARIOS, [])

    with ExitStack() as stack:

        def make(**options: Any) -> Scenario:
            scenario = Scenario(request.node.name, **options)
            made.append(scenario)
            return stack.enter_context(scenario)

        yield make


@pytest.fixture
def make_place(request: pytest.FixtureRequest) -> Iterator[Callable[..., Place]]:
    """Build places where two ends may meet (arguments of `Place`)."""
    made = request.node.stash.setdefault(_SCENARIOS, [])

    with ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> Place:
            place = Place(*arguments, **options)
            made.append(place)
            return stack.enter_context(place)

        yield make


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire that run the command `martlet` as users start it."""
    with two_hosts(tmp_path) as pair:
        yield pair
