"""Kind control: rules that change the attention of a trained model, for ``crosslight.steer(model, rule)``.

A rule is called as ``rule(weights, call)`` with the matrix after its softmax, (batch, heads, n, m), and a
`crosslight.hosts.Call`, and returns the matrix to use. It has a ``strength``: 0 changes nothing, 1 is the paper's.
"""
