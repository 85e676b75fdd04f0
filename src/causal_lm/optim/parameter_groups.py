from typing import Any


def parameter_groups(model: Any) -> Any:
    return list(model.named_parameters())
