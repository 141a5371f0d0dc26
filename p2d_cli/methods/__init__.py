"""The methods: one file each, under `heads/` for score-heads and `rows/` for mine-data (see `p2d_cli.registry`).

To add one, write one file: `rows/my_method.py` is the method `my-method`. Its first line is `my-method: ` and what
help texts say of it; its class, a `HeadMethod` or a `RowMethod`, bears that name as `name = "my-method"`. The class
says what the method takes and reads; an instance scores one repeat, or one pool. `passes()` yields what the model is
to read (`p2d_cli.engine.passes`), with rows encoded by `self.task.reader`; each pass is done before the next is made,
and gives its arrays to its `take`. `score()` then returns the scores, higher is better. Choices, grids, plans,
timings, journals, ranks and reports follow from that. Heavy libraries are imported where a pass reads.
"""
