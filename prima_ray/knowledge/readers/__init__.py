"""Readers of literature, a file a format.

A reader is a config class with a `kind` and a function ``read_<kind>(file, source, limits)`` that yields `Record`s:
where in the file, and the document or why there is none. One record's fault costs that record; raising `RecordRejected`
gives up the rest of the file. A new format is one file here and two lines in `prima_ray.knowledge.literature`.
"""
