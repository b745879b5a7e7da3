"""``torch.compile(model, backend="gpukern")``: training steps, and inference, through gpukern's kernels.

Of Dynamo's graph, what follows a convolution or a linear layer runs with it: a batch norm of any statistics, a
residual, an activation. :mod:`~gpukern.compiler.aten_graph` reads the graph, :mod:`~gpukern.compiler.front` finds the
groups with the matcher of :mod:`gpukern.fusion`, :mod:`~gpukern.compiler.lowering` makes them calls of
:mod:`~gpukern.compiler.steps`, whose gradients are those of :mod:`~gpukern.compiler.autograd`.
"""
