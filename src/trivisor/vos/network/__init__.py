"""The virtual operating system's network: what a machine's programs see as the world outside.

service.py   `vm.network`: ports, shape, cuts, captures
capture.py   packets of a machine's link, into a pcap file
pcap.py      the format of that file
"""
