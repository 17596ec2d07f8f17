"""A detector that is killed, starved and resumed until it is done, beside one that nothing disturbed."""
