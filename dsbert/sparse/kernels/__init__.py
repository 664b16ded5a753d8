"""The three products of a block-sparse linear layer.

forward  Y  = X W^T + b      X [T, in], Y [T, out]
dgrad    dX = dY W
wgrad    dW at the active blocks: [K, B, B]

    index        what the kernels read of a topology, and the shape of a backend
    products     the products, each by the backend chosen for it
    ops          the same as torch operators: autograd, fake tensors, torch.compile
    eager        the same for plain tensors, without what torch's dispatcher costs
    dispatch     measures, remembers on disk (cache.py, in a folder that trust.py has looked at), decides
    record       what was decided, as checkpoints keep it
    backends     all of them: reference.py plain torch, dense.py through a dense copy, cpu/ C++, triton_gpu/ Triton
"""
