"""The command line: flags to config, config to stage, result to words."""
