"""Hooks that give a consumer the inputs of each matrix, and the gradients by its outputs.

Linear layers get hooks. Fused experts, which compute with slices of a parameter, get a forward pass of
the same function that exposes the two products of each expert (`model.experts`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from trackstar.gradients.consumer import GradientConsumer
from trackstar.model.batching import Batch
from trackstar.model.experts import Routing, expert_arguments, expert_outputs, replaced_forward, routed
from trackstar.model.input_layouts import FLAT
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix


@final
class MatrixHooks:
    """Hooks on a model's matrices; see `matrix_hooks`.

    Args:
        model: The model.
        consumer: Receives the factors of the gradients.
    """

    def __init__(self, model: LanguageModel, consumer: GradientConsumer) -> None:
        self._model = model
        self._consumer = consumer
        self._batch = self._tokens = 0
        # Factors of the matrices that several calls compute with: saved inputs and gradients of each call.
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def start(self, batch: Batch) -> None:
        """Begin a batch."""
        self._batch, self._tokens = batch.token_ids.shape
        self._calls.clear()

    def finish(self) -> None:
        """Pass on the matrices of several calls, whose gradient is the sum over all of them."""
        for matrix in self._model.matrices:
            calls = self._calls.pop(matrix.name, [])
            if calls:
                saved, gradients = (self._joined(matrix, list(parts)) for parts in zip(*calls, strict=True))
                self._consumer.add(matrix, saved, gradients)

    def _joined(self, matrix: WeightMatrix, parts: list[Tensor]) -> Tensor:
        """The calls' rows of each token beside each other."""
        if any(self._model.layouts.get(path) is FLAT for path in matrix.modules):
            return torch.cat(parts, dim=1)
        return torch.cat([part.unflatten(1, (self._tokens, -1)) for part in parts], dim=2).flatten(1, 2)

    def forward_hook(self, matrix: WeightMatrix, path: str) -> Callable[..., Tensor | None]:
        """The forward hook of a linear layer."""
        layout = self._model.layouts.get(path)
        repeated = matrix.name in self._model.repeated

        def backward(saved: Tensor, gradients: Tensor) -> None:
            if layout is not None:
                gradients = layout.by_token(gradients, self._batch, self._tokens)
            if repeated:
                self._calls.setdefault(matrix.name, []).append((saved, gradients))
            else:
                self._consumer.add(matrix, saved, gradients)

        def forward(_module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            # Accelerate moves a module's inputs to its device behind this hook.
            inputs = arguments[0].detach().to(output.device)
            if layout is not None:
                inputs = layout.by_token(inputs, self._batch, self._tokens)
            saved = self._consumer.save_for_backward(matrix, inputs)
            starts_graph = not output.requires_grad
            if starts_graph:
                output.requires_grad_(True)
            output.register_hook(lambda gradients: backward(saved, gradients))
            # A leaf of the graph must not be changed in place, as OLMo does when it clips; a copy of it may.
            return output.clone() if starts_graph else None

        return forward

    def experts_forward(
        self, path: str, module: nn.Module, stacks: Mapping[str, Mapping[int, WeightMatrix]]
    ) -> Callable[..., Tensor]:
        """The forward pass of fused experts, whose matrices are given by parameter and number."""
        flat = self._model.layouts.get(path) is FLAT

        def product(key: str, routing: Routing, inputs: Tensor, outputs: Tensor) -> Tensor:
            matrices = stacks.get(f"{path}.{key}")
            if not matrices:
                return outputs
            saved = self._consumer.save_routed(matrices, inputs.detach(), routing)
            if not outputs.requires_grad:
                outputs = outputs.requires_grad_(True)
            outputs.register_hook(lambda gradients: self._consumer.add_routed(matrices, saved, gradients, routing))
            return outputs

        def forward(*arguments: Any, **options: Any) -> Tensor:
            hidden, indices, weights = expert_arguments(*arguments, *options.values())
            batch, tokens = (1, len(hidden)) if flat else (self._batch, self._tokens)
            routing = routed(indices, experts=int(module.num_experts), batch=batch, tokens=tokens)  # pyright: ignore[reportArgumentType]
            return expert_outputs(module, hidden, weights, routing, product)

        return forward


@contextmanager
def matrix_hooks(model: LanguageModel, consumer: GradientConsumer) -> Iterator[MatrixHooks]:
    """Hooks on all matrices of a model, removed afterwards."""
    hooks = MatrixHooks(model, consumer)
    experts: dict[str, dict[str, dict[int, WeightMatrix]]] = {}
    with ExitStack() as stack:
        for matrix in model.matrices:
            if matrix.expert is not None:
                of_module = experts.setdefault(matrix.parameter.rpartition(".")[0], {})
                of_module.setdefault(matrix.parameter, {})[matrix.expert] = matrix
            for path in matrix.modules:
                handle = model.module.get_submodule(path).register_forward_hook(hooks.forward_hook(matrix, path))
                stack.callback(handle.remove)
        for path, stacks in experts.items():
            module = model.module.get_submodule(path)
            stack.enter_context(replaced_forward(module, hooks.experts_forward(path, module, stacks)))
        yield hooks
