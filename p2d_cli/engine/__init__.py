"""The engine: one run of a stage, its inputs, its prompts, and the one reader of rows."""
