"""Networks that shrink: channels, masks of them, and networks cut to what is left.

.. include:: shrinking.md
"""
