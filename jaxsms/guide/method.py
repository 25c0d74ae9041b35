"""The method on one page.

.. include:: method.md
"""
