"""Parameter groups for an optimizer, by the role of each parameter.

Roles come from module types (a norm has "norm" in its class name) and from what the model declares
(``lm_head``, ``embeddings()``), never from parameter names.

    role            which parameters                                         weight decay   Muon
    hidden_matrix   2-D weights with no other role                           yes            yes
    head            the weight of ``lm_head``, where it is not tied          yes            no
    other_weight    weights of three and more dimensions (convolutions)      yes            no
    embedding       ``nn.Embedding`` tables, and a head tied to one          no             no
    norm_or_bias    norms, one-dimensional parameters, and those marked      no             no
                    ``_no_weight_decay`` (the convention of Mamba's code)

That no parameter is left out is asserted, as in nanochat (https://github.com/karpathy/nanochat).
"""

import inspect
from collections import Counter
from typing import Any

from torch import nn
from torch.optim import Optimizer

from causal_lm.models.base import CausalModel

ParameterGroups = list[dict[str, Any]]
"""``role``, ``params`` as (name, parameter) pairs, and ``weight_decay`` 0.0 for roles without
weight decay: what any ``torch.optim`` class takes as its first argument."""

ROLES = ("hidden_matrix", "head", "other_weight", "embedding", "norm_or_bias")
WITHOUT_DECAY = ("embedding", "norm_or_bias")


def parameter_groups(model: nn.Module | CausalModel) -> ParameterGroups:
    """Every trainable parameter of ``model``, in one group per role that occurs."""
    embeddings, heads = _embedding_ids(model), _head_ids(model)
    owners = {id(p): owner for owner in model.modules() for p in owner.parameters(recurse=False)}
    params: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        role = _role_by_type(parameter, owners[id(parameter)])
        if id(parameter) in embeddings:
            role = "embedding"
        elif id(parameter) in heads:
            role = "head"
        if parameter.requires_grad:
            params[role].append((name, parameter))
    groups: ParameterGroups = [{"role": role, "params": ps} for role, ps in params.items() if ps]
    for group in groups:
        if group["role"] in WITHOUT_DECAY:
            group["weight_decay"] = 0.0
    assert_complete(model, groups)
    return groups


def assert_complete(model: nn.Module | CausalModel, groups: ParameterGroups) -> None:
    """Raise AssertionError, with names, unless ``groups`` (or those of an optimizer) hold each
    trainable parameter exactly once."""
    params = [p for group in groups for p in group["params"]]
    held = Counter(id(p[1] if isinstance(p, tuple) else p) for p in params)
    trained = [(name, held[id(p)]) for name, p in model.named_parameters() if p.requires_grad]
    wrong = [f"{name} ({times} times)" for name, times in trained if times != 1]
    assert not wrong, f"parameters must be in one optimizer group each: {', '.join(wrong)}"


def describe_groups(optimizer: Optimizer) -> str:
    """A table of the groups of ``optimizer``: role, tensors, parameters, weight decay, class."""
    lines = [f"{'role':<15}{'tensors':>9}{'parameters':>14}{'decay':>8}  optimizer"]
    for part in getattr(optimizer, "optimizers", (optimizer,)):
        for group in part.param_groups:
            size = sum(p.numel() for p in group["params"])
            lines.append(
                f"{group.get('role', '–'):<15}{len(group['params']):>9,}{size:>14,}"
                f"{group.get('weight_decay', 0.0):>8g}  {type(part).__name__}"
            )
    return "\n".join(lines)


def _embedding_ids(model: Any) -> set[int]:
    """Of the declared embeddings, and of every module that is one."""
    declared = getattr(model, "embeddings", None)
    tables = list(declared()) if inspect.ismethod(declared) else []
    tables += [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    return {id(table.weight) for table in tables}


def _head_ids(model: Any) -> set[int]:
    """Of the declared head, and of what a model of transformers inside calls its output layer."""
    outputs = [getattr(module, "get_output_embeddings", None) for module in model.modules()]
    heads = [getattr(model, "lm_head", None), *(output() for output in outputs if output)]
    modules = [head for head in heads if isinstance(head, nn.Module)]
    return {id(p) for head in modules for p in head.parameters() if p.dim() > 1}


def _role_by_type(parameter: nn.Parameter, owner: nn.Module) -> str:
    is_norm = "norm" in type(owner).__name__.lower() and not isinstance(owner, nn.Linear)
    if parameter.dim() < 2 or is_norm or getattr(parameter, "_no_weight_decay", False):
        return "norm_or_bias"
    return "hidden_matrix" if parameter.dim() == 2 else "other_weight"
