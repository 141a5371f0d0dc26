"""Which heads does the task move? One method a file, whose name is that of its class."""
