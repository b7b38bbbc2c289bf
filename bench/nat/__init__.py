"""How any two kinds of network meet: every pair of NATs, by rendezvous, STUN and TURN.

    [A] u0 --[its routers]-- A --+------+-- broker (mosquitto)
                                 | core |-- stun, turn (coturn)       20 ms between any two ends
    [B] u0 --[its routers]-- B --+------+

`bench.nat.kinds` has the kinds, and what a pair of them can hope for: where it can be direct by
rights, it has to be in the end; where it cannot, it has to be there by the relay. Where a hard NAT
is searched for an open port it may be direct, with a little more patience than the default: the
search takes 16 s, begins after 2, and succeeds in seven of eight runs. At once, if the hard one is
the kernel's: here that has only 100 ports.

    ./dev bench nat [--only A:B]... [--runs 1] [--turn none] [--family 4|6] [--out FILE]

In the table: direct MS, packets passed both ways after so long and both ends sent directly; relay
MS, either end sent through the relay; then when both sent directly, if they did. Bold: not what it
has to be. Needs root. Every raw value is written as JSON, also when it is interrupted. The
directory of a run that failed is kept and named.
"""

from bench.nat.course import main

__all__ = ["main"]
