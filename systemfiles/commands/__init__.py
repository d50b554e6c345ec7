"""The larger commands of `systemfiles`, a module each: `add_options(parser)` and `run(options) -> exit status`."""
