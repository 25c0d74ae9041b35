"""The main job, comparisons, and taking the soup away.

.. include:: main_job.md
"""
