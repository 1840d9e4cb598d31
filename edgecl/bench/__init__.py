"""Published comparisons, each reproduced by one command (``edgecl bench``), in cells that a stopped run does not compute again."""
