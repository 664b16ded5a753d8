"""The three products of a block-sparse linear layer.

forward  Y  = X W^T + b      X [T, in], Y [T, out]
dgrad    dX = dY W
wgrad    dW at the active blocks: [K, B, B]
"""
