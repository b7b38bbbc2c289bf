"""What `martlet doctor` thinks: plain facts in, findings out. Pure.

::

    shell/doctor/   gathers facts.Facts: what the kernel, the network and the servers say
    doctor/         judge() makes a Report of them: findings, each with a state and a remedy
    cli/doctor.py   prints it

Nothing here does I/O, so each finding is a function of values that a test can write down. What no
fact was gathered for has no finding: a check that could not be made is a fact, too, and says so.
"""
