"""Complete programs: batch norm, dropout, TrainState, a schedule of sparsity.

.. include:: recipes.md
"""
