"""The roaming matrix: how long traffic through the tunnel is silent when something happens.

          u0 --lan[natA0]wan-- [ A0 ] --a0 +------+ b0-- [ B0 ] --wan[natB0]lan-- u0
     [A]                                   | core |                                   [B]
          u1 --lan[natA1]wan-- [ A1 ] --a1 +------+ b1-- [ B1 ] --wan[natB1]lan-- u1

Probes of 64 bytes every 5 ms each way at once, and an ssh session with an echoed keystroke every
20 ms, run through the tunnel while, in each cell, the same thing happens again and again on the
uplink that the mover's active path uses. A gap is the longest silence beyond the probes' spacing
around it; the way is "from" the mover or "toward" it, "A>B" and "B>A" where both move. Between two
runs both ends get the time to warm a second path; what is done there is not counted, but must not
kill the session. `bench.roam.rows` has the rows, `bench.roam.goals` what they must reach.

    ./dev bench roam [--only ROW]... [--runs 20] [--redundancy off|interactive|both] [--out FILE]

Needs root. Every raw value is written as JSON, also when it is interrupted. The directory of a run
that failed (the session died, traffic did not recover) is kept and named.
"""

from bench.roam.course import main

__all__ = ["main"]
