"""Which rows are to be learnt? One method a file, whose name is that of its class."""
