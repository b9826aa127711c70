"""Multiply a batch by a sparse weight, and differentiate the product.

It teaches the sparse array and the layer on one pattern, and takes a second or two.

The weight is block-diagonal and each block is bidiagonal: 1 on the diagonal and 0.25 above it. The
product and its gradients to the input and to the stored values are checked against dense ones.

  python examples/sparse_linear_layer.py
"""

import mlx.core as mx
import numpy as np
from _common import Parser, add_common_arguments, start

from mlx_sparse_nn import BlockSparseLinear, csr_array, patterns


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--features", type=int, default=64, help="rows and columns of the weight")
    parser.add_argument("--blocks", type=int, default=8, help="bidiagonal blocks; divides features")
    parser.add_argument("--batch", type=int, default=4, help="vectors to multiply")
    add_common_arguments(parser)
    args = parser.parse_args()
    start(parser, args)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    try:
        pattern = patterns.bidiagonal_blocks(args.features, args.blocks)
    except ValueError as error:
        parser.error(str(error))

    values = mx.array(np.where(pattern.row_indices == pattern.indices, 1, 0.25).astype(np.float32))
    A = csr_array((values, pattern.indices, pattern.indptr), shape=pattern.shape)
    print(f"weight    {A}")

    x = mx.random.normal((args.batch, args.features, 1))
    y = A @ x  # one call for the whole batch: (batch, features, features) is never formed
    print(f"product   {A.shape} @ {x.shape} -> {y.shape}")

    def sparse_loss(x: mx.array, values: mx.array) -> mx.array:
        A = csr_array((values, pattern.indices, pattern.indptr), shape=pattern.shape)
        return (A @ x).square().sum()

    def dense_loss(x: mx.array, w: mx.array) -> mx.array:
        return (w @ x).square().sum()

    dense = A.todense()
    rows, cols = mx.array(pattern.row_indices), mx.array(pattern.indices)
    x_grad, values_grad = mx.grad(sparse_loss, argnums=(0, 1))(x, values)
    x_expected, dense_grad = mx.grad(dense_loss, argnums=(0, 1))(x, dense)
    difference("y", y, dense @ x)
    difference("d/dx", x_grad, x_expected)
    difference("d/dvalues", values_grad, dense_grad[rows, cols])

    # The same pattern as a layer, whose stored values an optimizer trains.
    layer = BlockSparseLinear(args.features, args.features, pattern, bias=False)
    layer.weight = values
    difference("layer", layer(x[..., 0]), y[..., 0])
    print(f"layer     {layer}")


def difference(name: str, got: mx.array, expected: mx.array) -> None:
    """Print how far a result is from the dense one, and end with an error if that is too far."""
    error = mx.abs(got - expected).max().item()
    print(f"{name:<9} {got.shape}, at most {error:.1e} from dense")
    if not mx.allclose(got, expected, rtol=1e-4, atol=1e-4).item():
        raise SystemExit(f"{name} differs from the dense result")


if __name__ == "__main__":
    main()
