"""Run one random roam again and tell what happened: `python -m tests.sim.replay SEED`."""

import sys

from tests.sim.roam import Roam


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("usage: python -m tests.sim.replay SEED")
    roam = Roam(int(sys.argv[1]), log=print)
    world = roam.world
    for name, host in world.hosts.items():
        for uplink in host.uplinks:
            print(f"{name} {uplink}")
    print(f"delay {world.delay} loss {world.loss} jitter {world.jitter} mtu {world.mtu}")
    try:
        roam.run()
    finally:
        events = [(when, name, e) for name, h in world.hosts.items() for when, e in h.events]
        for when, name, event in sorted(events, key=lambda entry: entry[0]):
            print(f"{when:.4f} {name}: {event}")


if __name__ == "__main__":
    main()
