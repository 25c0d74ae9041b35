"""Speed, memory, several devices and hosts.

.. include:: devices.md
"""
