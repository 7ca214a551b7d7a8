"""Networks of machines: one link each, made the same behind every wall.

provide.py     the one call that engines make: what a machine's network is made of
pool.py        addresses: a block of four for each machine; the interface's name says which, so the kernel keeps the book
links.py       a veth pair into a namespace of the machine's own, or a tap, by pyroute2
firewall.py    whether another firewall of the host would stop them all the same
rules.py       what machines may reach, as data; table.py brings it into nftables
own.py         what holds for one machine alone and changes while it runs; nft.py brings that into nftables
control.py     asking a running machine's helper
networks.py    named networks of a home, and the names of machines on them
resolvers.py   who the host asks for names
passt.py       instead of all this, for whoever is not root: user-mode NAT
relay.py       the helper on the host for published ports and names (guest/src/relay.c)

Every link lives no longer than its machine: a veth goes with the namespace, a tap with its descriptor, and a machine's own table with the
helper under its keeper. What stays on the host is one nftables table that speaks of nothing but our interfaces, and that goes with the
last of them.
"""
