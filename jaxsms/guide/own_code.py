"""Your own network and training.

.. include:: own_code.md
"""
