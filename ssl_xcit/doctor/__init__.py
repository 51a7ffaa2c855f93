"""Examine the machine and the installation for `ssl-xcit doctor`."""
