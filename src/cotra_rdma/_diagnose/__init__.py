"""Inspects hosts, devices, owners and graphs, for `cotra doctor` and `cotra info`."""
