"""How many copies, which sparsity, which schedule.

.. include:: choosing.md
"""
