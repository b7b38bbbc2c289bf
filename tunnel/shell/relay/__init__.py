"""Relays: addresses at TURN servers, and how the engine sends from them without knowing of TURN.

The engine knows UDP sockets and nothing else. So each relay has a socket on the loopback interface
that the engine has like any other, and for each peer address that data goes to another one, the
*shim*, connected to it. To the engine the shim is the peer:

    engine -- its socket --(loopback)-- shim -- ChannelData -- server -- peer

Runs of datagrams cross the loopback as one message each way (UDP_SEGMENT, UDP_GRO); here the 4
bytes of ChannelData are put on or taken off. What is not the engine's, checks and handshakes, does
not take that way: `send` and `received` pass it between the node and the server.

Where relays are asked for (`places`): for each family of relayed addresses, from the best address
of the best two interfaces that reach a server by that family, or from the best one by the other
family. At each place the ways to the servers are tried in the order of the configuration: the next
one after 0.3 s without success, or at once when one fails, and the first that succeeds is used.
So a server is reached over TCP where UDP is blocked, and a second server where the first is down.

A relay that ends is asked for anew, at once if it lived for a while. All that has failed is tried
again after 1 s, doubled up to 60 s, and at once when the network changes.
"""

from tunnel.shell.relay.relays import Relays

__all__ = ["Relays"]
