"""Train a graph attention network on a real graph, with sparse arrays alone.

It teaches attention over the edges of a graph, and takes some seconds.

Zachary's karate club: 34 people, 78 friendships, and the two clubs into which they split. The side
of four people is known; the network finds those of the others. Scores of edges are sampled
products, weights their softmax over each row, and neighbours are added up by a sparse product.

  python examples/graph_attention.py
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from _common import Parser, add_common_arguments, start

from mlx_sparse_nn import CSRArray, CSRPattern, csr_array, sddmm, softmax

KNOWN = (0, 1, 32, 33)  # the two leaders, and a friend of each


class GraphAttention(nn.Module):
    """A layer of graph attention with heads, each by scaled products of queries and keys.

    Args:
        in_dims: Features of a node.
        out_dims: Of each head.
        heads: Number of heads.
    """

    def __init__(self, in_dims: int, out_dims: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(in_dims, heads * out_dims, bias=False)
        self.key = nn.Linear(in_dims, heads * out_dims, bias=False)
        self.value = nn.Linear(in_dims, heads * out_dims, bias=False)

    def __call__(self, x: mx.array, edges: CSRPattern) -> mx.array:
        """Return ``(n_nodes, heads * out_dims)`` of ``x (n_nodes, in_dims)``."""
        of_heads = (mx.split(f(x), self.heads, axis=1) for f in (self.query, self.key, self.value))
        outputs = []
        for query, key, value in zip(*of_heads, strict=True):  # (n_nodes, out_dims) each
            # Of the scores of all pairs, those of edges alone: (n_edges,).
            scores = sddmm(edges, query.T, key.T) / query.shape[1] ** 0.5
            outputs.append(softmax(CSRArray(scores, edges)) @ value)
        return mx.concatenate(outputs, axis=1)


class Network(nn.Module):
    """Two layers of graph attention."""

    def __init__(self, n_nodes: int, dims: int, heads: int):
        super().__init__()
        self.first = GraphAttention(n_nodes, dims, heads)
        self.second = GraphAttention(dims * heads, 2, 1)

    def __call__(self, x: mx.array, edges: CSRPattern) -> mx.array:
        return self.second(nn.elu(self.first(x, edges)), edges)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--dims", type=int, default=8, help="features of a head")
    parser.add_argument("--heads", type=int, default=2, help="heads of the first layer")
    add_common_arguments(parser)
    args = parser.parse_args()
    start(parser, args)
    for name in ("steps", "dims", "heads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    try:
        import networkx
    except ImportError:
        parser.error("the graph comes with networkx: pip install networkx")

    graph = networkx.karate_club_graph()
    clubs = np.array([graph.nodes[i]["club"] == "Officer" for i in graph.nodes])
    # Everybody attends to friends and to themselves.
    adjacency = networkx.to_numpy_array(graph) != 0
    edges = csr_array(adjacency | np.eye(len(clubs), dtype=bool)).pattern
    print(f"graph     {edges}")

    model = Network(len(clubs), args.dims, args.heads)
    optimizer = optim.Adam(learning_rate=1e-2)
    x, known = mx.eye(len(clubs)), mx.array(KNOWN)
    labels = mx.array(clubs.astype(np.int32))

    def loss_of() -> mx.array:
        logits = model(x, edges)
        return nn.losses.cross_entropy(logits[known], labels[known], reduction="mean")

    step = nn.value_and_grad(model, loss_of)
    for i in range(args.steps):
        loss, grads = step()
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        if i in (0, args.steps - 1):
            print(f"step {i + 1:>4} loss {loss.item():.4f}")
    right = (mx.argmax(model(x, edges), axis=1) == labels).sum().item()
    print(f"right     {right} of {len(clubs)}, {len(KNOWN)} of them known")


if __name__ == "__main__":
    main()
