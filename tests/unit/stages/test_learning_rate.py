import numpy as np

from p2d_cli.stages.train import DEFAULT_LEARNING_RATE, default_learning_rate


def test_all_heads_have_the_rate_of_all_attention():
    """At that of a few heads they learn nothing, see the study's `cross.toml`."""
    some_LH = np.array([[True, False], [True, True]])
    assert default_learning_rate("heads", some_LH) == DEFAULT_LEARNING_RATE["heads"]
    assert default_learning_rate("heads", np.ones_like(some_LH)) == DEFAULT_LEARNING_RATE["attention"]
    for scope, rate in DEFAULT_LEARNING_RATE.items():
        assert default_learning_rate(scope, None) == rate
