"""Pure mathematics of the method: values in, values out; no files, clock, logging or environment."""
