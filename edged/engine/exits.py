"""The exit statuses by which an engine process says why it ended."""

#: A mistake of ours.
EXIT_BUG = 70
#: Its daemon is gone.
EXIT_ORPHAN = 81
#: The model cannot be loaded; the reason was told before.
EXIT_LOAD = 82
#: No memory was left.
EXIT_OOM = 83
