"""Launches and bytes of a training step, counted without a GPU: ``python -m bench.training_step``.

A step is forward, cross-entropy loss, backward and the optimizer, counted three ways:

*PyTorch* runs the network on the meta device and counts its operators by their formula (:mod:`.operators`).
*convert* is ``gpukern.convert``, *compile* ``torch.compile(backend="gpukern")``: both run on the CPU as they would on
the named device, with every launch recorded and none made (:mod:`gpukern.runtime.accesses` finds what a kernel reads
and writes), and what PyTorch's own operators do beside the kernels counted as in the first.

Each tensor that a launch reads counts once, whole, however often its kernel loads an element; so does each that it
writes. An *activation* is a tensor of the network's dtype, or of integers, that has the shape of an operator's result
in PyTorch's forward pass, or as many elements in whole images: activations, their gradients, positions of maxima.
*Other* is the rest: parameters, their gradients, statistics, partial sums, packed copies. In float32 a workspace of
partial sums with as many elements as an activation counts as one.

The optimizer is SGD with momentum and counts by its launches only. What autograd *saves* is counted in a forward pass:
each storage once and whole, but those of parameters and buffers.
"""
