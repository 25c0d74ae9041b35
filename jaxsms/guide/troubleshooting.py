"""What the programs say, and what to do.

.. include:: troubleshooting.md
"""
