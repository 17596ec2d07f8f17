import functools

import pytest
import torch


@pytest.fixture
def compiled(monkeypatch) -> list[torch.fx.GraphModule]:
    """Every graph that `torch.compile` compiles from here on; they run as they are, without a compiler."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs
