"""The virtual operating system's network: what a machine's programs see as the world outside.

service.py   `vm.network`: ports, shape, egress, cuts, captures
decisions.py what its egress policy allows and refuses, as it happens
capture.py   packets of a machine's link, into a pcap file
pcap.py      the format of that file
"""
