"""Scores of every gradient method by dense matrices, with the loss linearised at the outputs of another network."""

import torch
from torch.func import functional_call, jacrev

from stride_lightning import BinaryClassification, Classification
from tests.helpers.gradient_models import blocks_of, trainable


class Dense:
    """Dense derivatives of a data set: the network's Jacobian, and the loss at other outputs o."""

    def __init__(self, task, model, readout, data, layers=None):
        x, y = data.tensors
        chosen = {name: value.detach() for name, value in trainable(model, layers).items()}
        jacobians = jacrev(lambda values: functional_call(model, values, x))(chosen)
        self.jacobian = torch.cat([part.detach().flatten(2) for part in jacobians.values()], 2)  # (n, C, p)
        o = readout(x).detach()
        eye, scale = torch.eye(o.shape[1], dtype=o.dtype), 1.0
        if isinstance(task, Classification):
            p, targets = o.softmax(1), eye[y]
            self.hessian = p[:, :, None] * eye - p[:, :, None] * p[:, None]
        elif isinstance(task, BinaryClassification):
            p, targets = o.sigmoid(), y[:, None]
            self.hessian = (p * (1 - p))[:, :, None]
        else:
            p, targets, scale = o, y.reshape(o.shape), 1 / task.noise_std**2
            self.hessian = (scale * eye).expand(len(o), -1, -1)
        residual = scale * (p - targets)
        self.gradients = self.moved(residual)
        if isinstance(task, Classification):
            at_target = (p * targets).sum(1, keepdim=True)
            self.margins = self.moved(targets - (1 - targets) * p / (1 - at_target))
            self.rest = (1 - at_target)[:, 0]
            self.curved = self.rest * at_target[:, 0]
        elif isinstance(task, BinaryClassification):
            self.margins, self.rest = self.moved(2.0 * targets - 1), residual.abs()[:, 0]
            self.curved = self.hessian[:, 0, 0]
        else:
            self.rest = residual.norm(dim=1)
            self.margins, self.curved = self.moved(-residual / self.rest[:, None]), scale * torch.ones_like(self.rest)

    def moved(self, direction):
        """Directions of the outputs as gradients in the parameters."""
        return torch.einsum("ncp,nc->np", self.jacobian, direction.to(self.jacobian))

    def gauss_newton(self):
        return torch.einsum("ncp,ncd,ndq->pq", self.jacobian, self.hessian, self.jacobian) / len(self.jacobian)


def damped(matrix, size, num, damping):
    """The damped matrix; the mean eigenvalue is over those that can be non-zero."""
    return matrix + damping * matrix.trace() / min(size, num) * torch.eye(size, dtype=matrix.dtype)


def whole(queries, train, damping, model):
    matrix = train.gauss_newton()
    return queries.gradients @ torch.linalg.solve(
        damped(matrix, *train.gradients.shape[::-1], damping), train.gradients.T
    )


def diagonal(queries, train, damping, model):
    squares = train.gradients.square().mean(0)
    return queries.gradients / (squares + damping * squares.mean()) @ train.gradients.T


def datainf(queries, train, damping, model):
    def inverse(rows):
        mean = rows.square().mean() * torch.eye(rows.shape[1], dtype=rows.dtype)
        return sum(torch.linalg.inv(torch.outer(row, row) + damping * mean) for row in rows) / len(rows)

    blocks = [(queries.gradients[:, at], train.gradients[:, at]) for at in blocks_of(model).values()]
    return sum(mine @ inverse(theirs) @ theirs.T for mine, theirs in blocks)


def by_layer(queries, train, damping, model):
    matrix, num = train.gauss_newton(), len(train.gradients)
    blocks = list(blocks_of(model).values())
    mean = sum(matrix[at, at].sum() for at in blocks) / sum(min(len(at), num) for at in blocks)
    scores = 0
    for at in blocks:
        block = matrix[at][:, at] + damping * mean * torch.eye(len(at), dtype=matrix.dtype)
        scores = scores + queries.gradients[:, at] @ torch.linalg.solve(block, train.gradients[:, at].T)
    return scores


def trak(queries, train, damping, model, weights=None):
    rows = train.margins if weights is None else train.margins * weights.sqrt()[:, None]
    kernel = damped(rows.T @ rows / len(rows), rows.shape[1], len(rows), damping)
    return queries.margins @ torch.linalg.solve(kernel, train.margins.T) * train.rest


def trak_newton(queries, train, damping, model):
    return trak(queries, train, damping, model, train.curved)


REFERENCES = {
    "grad-dot": lambda queries, train, damping, model: queries.gradients @ train.gradients.T,
    "diagonal": diagonal,
    "datainf": datainf,
    "influence-cg": whole,
    "influence-lissa": whole,
    "last-layer": whole,
    "logra": by_layer,
    "trak": trak,
    "trak-newton": trak_newton,
}
