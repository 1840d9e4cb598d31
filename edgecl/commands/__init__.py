"""Commands of ``edgecl`` in modules of their own; :mod:`edgecl.cli` puts them together."""
