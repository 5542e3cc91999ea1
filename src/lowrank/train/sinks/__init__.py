"""Where else a run reports to: programs that collect runs, each a file, each imported only when it is asked for."""
