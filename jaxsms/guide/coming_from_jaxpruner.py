"""The names of jaxpruner and what they are here.

.. include:: coming_from_jaxpruner.md
"""
