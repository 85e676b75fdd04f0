"""Models of other libraries behind our interface: transformers and x-transformers.

They get the unshifted batch, our attention mask and never any labels. At construction two packed
documents are run to test whether the model applies the mask; one that does not is limited to rows
of one document, padded on the right.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from causal_lm import extras
from causal_lm.masks import AttentionMask
from causal_lm.models.base import BaseCausalModel, Mask, check_length

MAX_PADDED_VOCABULARY = 1.02  # largest embedding, relative to the tokenizer: many are padded
CACHE = ("past_key_values", "cache")  # argument that takes a cache: the older name, that of 5.24


@torch.no_grad()
def keeps_documents_apart(model: Callable[..., Tensor], vocab_size: int) -> bool:
    """Whether two documents in a packed row get the logits that each gets alone (eval mode)."""
    ids = torch.arange(7)[None] % vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    mask = AttentionMask.from_document_ids(torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    alone = [model(ids[:, part], positions[:, part], None) for part in (slice(3), slice(3, 7))]
    expected = torch.cat(alone, dim=1)
    try:
        packed = model(ids, positions, mask)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # it does not accept the mask
    as_one_document = model(ids, torch.arange(7)[None], None)
    mixed = (as_one_document - expected).abs().max()  # what ignoring the mask would change
    return bool((packed - expected).abs().max() <= 1e-5 + 0.01 * mixed)


class ExternalModel(BaseCausalModel):
    """Base of the wrappers: checks length and mask for ``net``, the model of the library."""

    def __init__(self, net: Any, vocab_size: int, max_positions: int | None) -> None:
        super().__init__()
        self.net, self.max_positions, self.applies_mask = net, max_positions, True
        self.eval()
        is_meta = next(self.parameters()).is_meta  # the parameters are counted, nothing can run
        self.applies_mask = is_meta or keeps_documents_apart(self, vocab_size)
        self.train()  # as any new module; transformers returns pretrained weights in eval mode

    def checked_mask(self, length: int, attention_mask: Mask) -> Mask:
        """The mask of rows of ``length`` slots where it says more than plain causal, else None.
        Raises ValueError for rows longer than the model's positions, or a mask it does not apply.
        """
        check_length(length, self.max_positions)
        if attention_mask is None or attention_mask.plain_causal:
            return None
        if not self.applies_mask:
            todo = "set data.layout=padded and data.padding_side=right"
            raise ValueError(f"this model ignores the attention mask: {todo}, or another model")
        return attention_mask


class TransformersModel(ExternalModel):
    """A causal language model of ``transformers``; :func:`huggingface` makes one."""

    def __init__(self, net: Any, vocab_size: int, standalone: dict[str, Any], peft=()) -> None:
        self.forward_parameters = frozenset(inspect.signature(net.forward).parameters)
        self.standalone, self.head_is_plain = standalone, has_plain_head(net)
        self.peft_models = peft  # the PeftModel around ``net``, which has the same weights
        super().__init__(net, vocab_size, getattr(net.config, "max_position_embeddings", None))

    @property
    def lm_head(self) -> nn.Linear | None:  # type: ignore[override]  # a part of ``net``
        return self.net.get_output_embeddings() if self.head_is_plain else None

    def _kwargs(self, input_ids, position_ids, attention_mask: Mask, cache: Any) -> dict[str, Any]:
        """The inputs as keyword arguments of transformers; a mask is passed as (B, 1, T, T)."""
        # The cache of a recurrent model, whose positions are unlimited, cannot tell its length.
        n_cached = 0 if cache is None or self.max_positions is None else cache.get_seq_length()
        mask, dense = self.checked_mask(n_cached + input_ids.shape[1], attention_mask), None
        if mask is not None:
            is_bool = self.net.config._attn_implementation == "sdpa"
            dense = (mask.to_dense() if is_bool else mask.to_additive())[:, None]
        given = dict.fromkeys(CACHE, cache)
        given |= {"position_ids": position_ids, "attention_mask": dense}
        given = {name: value for name, value in given.items() if name in self.forward_parameters}
        return {"input_ids": input_ids, "use_cache": cache is not None} | given

    def forward(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        return self.net(**self._kwargs(input_ids, position_ids, attention_mask, cache)).logits

    def hidden_states(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        given = self._kwargs(input_ids, position_ids, attention_mask, cache)
        return self.net.base_model(**given).last_hidden_state

    def make_cache(self) -> Any:
        if self.forward_parameters.isdisjoint(CACHE):
            return None
        return extras.load("transformers", "huggingface").DynamicCache(config=self.net.config)

    def standalone_config(self) -> dict[str, Any]:
        return self.standalone


@torch.no_grad()
def has_plain_head(net: Any) -> bool:
    """Whether the logits are exactly ``hidden_states @ head.weight.T``."""
    head = net.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or head.weight.is_meta:
        return False
    net.eval()
    ids = torch.tensor([[0, 1]])
    hidden = net.base_model(input_ids=ids).last_hidden_state
    return torch.allclose(head(hidden), net(input_ids=ids).logits)  # some scale or soft-cap them


def huggingface(
    vocab_size: int, config: Mapping[str, Any] | None = None, init_from: str | None = None,
    lora: Mapping[str, Any] | None = None,
) -> TransformersModel:  # fmt: skip
    """Any causal language model of ``transformers``, for a tokenizer of ``vocab_size`` tokens.

    ``config`` has ``model_type`` and other keys of a new model's configuration; ``init_from`` is
    the folder, or the name on the hub, of a pretrained one, whose own code is never run. ``lora``,
    unless its ``r`` is None, adds adapters, which are trained alone (arguments of ``LoraConfig``).
    Raises ModuleNotFoundError without the extra, ValueError unless one of the two is given and the
    vocabulary is the tokenizer's.
    """
    library = extras.load("transformers", "huggingface")
    library.utils.logging.disable_progress_bar()  # log files have no use for progress bars
    if (config is None) == (init_from is None):
        raise ValueError("give either model.config, of a new model, or model.init_from")
    if config is not None:
        kind = library.AutoConfig.for_model(**({"vocab_size": vocab_size} | dict(config)))
        net = library.AutoModelForCausalLM.from_config(kind, trust_remote_code=False)
        source, standalone = "model.config", dict[str, Any]()
    else:
        options = {"dtype": torch.float32, "trust_remote_code": False}
        source = f"model.init_from={init_from}"
        with extras.reading(f"{source} cannot be loaded (code of a repository is never run)"):
            net = library.AutoModelForCausalLM.from_pretrained(init_from, **options)
        standalone = {"init_from": None, "config": net.config.to_dict()}
    size = net.get_input_embeddings().num_embeddings
    if not vocab_size <= size <= MAX_PADDED_VOCABULARY * vocab_size:
        ours = f"the tokenizer of this run has {vocab_size}: a pretrained model needs its own"
        raise ValueError(f"{source} has a vocabulary of {size} tokens, but {ours}")
    peft_models = []
    if lora and lora.get("r"):
        peft = extras.load("peft", "peft")
        names = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
        options = {names.get(k, k): v for k, v in lora.items()} | {"task_type": "CAUSAL_LM"}
        with warnings.catch_warnings(action="ignore"):  # of what peft itself calls and sets
            peft_models = [peft.get_peft_model(net, peft.LoraConfig(**options))]
    return TransformersModel(net, vocab_size, standalone, peft_models)


class XTransformers(ExternalModel):
    """A decoder of ``x-transformers``; ``decoder`` has more arguments of its ``Decoder``. Raises
    ModuleNotFoundError where the extra is not installed."""

    def __init__(
        self, vocab_size: int, d_model: int, n_heads: int, n_layers: int, max_positions: int,
        decoder: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        library = extras.load("x_transformers", "x-transformers")
        sizes = {"dim": d_model, "depth": n_layers, "heads": n_heads}
        layers = library.Decoder(**sizes, attn_dim_head=d_model // n_heads, **(decoder or {}))
        slots = {"num_tokens": vocab_size, "max_seq_len": max_positions}
        net = library.TransformerWrapper(attn_layers=layers, **slots)
        super().__init__(net, vocab_size, max_positions)

    @property
    def lm_head(self) -> nn.Linear | None:  # type: ignore[override]  # a part of ``net``
        return self.net.to_logits

    def hidden_states(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        mask = self.checked_mask(input_ids.shape[1], attention_mask)
        given: dict[str, Any] = {"pos": position_ids, "return_embeddings": True}
        if mask is not None:  # it includes the causal mask of x-transformers
            given |= {"attn_mask": mask.to_dense()[:, None], "causal": False}
        return self.net(input_ids, **given)
