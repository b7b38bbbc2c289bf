"""The only room with asyncio, sockets, clocks and netlink."""
