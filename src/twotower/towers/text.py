"""Text encoders inside the towers: a pretrained transformer with pooling, trained fully or with LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.errors import InputError
from twotower.features.tokens import NEEDS, TokenEncoder, quiet
from twotower.towers.tables import is_without_memory

#: Maximum number of tokens, including padding, per pass of the transformer. Texts of similar length share a pass, so
#: that there is little padding; larger passes are faster on an accelerator and slower on a CPU.
TOKENS = {"cpu": 4096, "cuda": 65_536}


class TextTransformer(nn.Module):
    """A pretrained transformer: tokens [M, L] -> unit vectors, [M, width].

        v = h / |h|,   h = pooling of the last layer's token vectors (mean, first, ..., as the model specifies)

    With `train: lora` all pretrained weights are frozen, and B A alpha / r is added to the weights of all linear layers
    (Hu et al. 2022, "LoRA"); only A and B are in the state dict, so a model folder has only the adapter. A weight that
    is not in the state dict comes from the pretrained model, whose checksum is in the description.

    Built inside `tables_without_memory` or on the meta device, it has no weights, only shapes.

    Args:
        encoder: the settings and the description of the pretrained model.

    Attributes:
        width: width of the vectors.
        train_mode: "lora" or "full".
        trained: names of the parameters that training changes and the state dict contains.
        fixed: names of the parameters and buffers that the state dict leaves out.

    Raises:
        InputError: a package or the pretrained weights are missing.
    """

    def __init__(self, encoder: TokenEncoder) -> None:
        super().__init__()
        declared, self.description = encoder.declared, encoder.model
        self.width, self.train_mode = encoder.model.width, declared.train
        is_empty = is_without_memory() or torch.get_default_device().type == "meta"
        try:
            with quiet(), torch.device("meta" if is_empty else torch.get_default_device()):
                self.model = _transformer(encoder, is_empty=is_empty)
                if declared.train == "lora":
                    _add_updates(self.model, encoder)
        except ModuleNotFoundError as error:
            raise InputError(
                f"text model {declared.model!r:.200}: needs the package {error.name!r}; run {NEEDS}"
            ) from None
        self.trained = frozenset(name for name, one in self.named_parameters() if one.requires_grad)
        self.fixed = frozenset(self.state_dict()) - self.trained
        if declared.gradient_checkpointing:
            # Versions of transformers before 5.23 have only the second name, and later ones warn about it.
            named = "activation_checkpointing_enable", "gradient_checkpointing_enable"
            enable = next(getattr(self.model, name) for name in named if hasattr(self.model, name))
            enable({"use_reentrant": False})
        self.register_state_dict_post_hook(_leave_out_fixed)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_fixed)  # type: ignore[no-untyped-call]

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode texts, given as token ids plus 1, [M, L], padded with 0 -> [M, width]; zeros for a row without tokens.

        Each distinct row is encoded once.
        """
        distinct, place = torch.unique(tokens, dim=0, return_inverse=True)
        lengths = (distinct > 0).sum(1)
        ordered = torch.argsort(lengths, stable=True)
        sizes = lengths[ordered].tolist()
        if not sizes or not sizes[-1]:
            return self._nothing(len(tokens))
        empty = sum(size == 0 for size in sizes)
        parts = [torch.zeros(empty, self.width, device=self._device)] if empty else []
        parts += [self._vectors(distinct[ordered[rows], : sizes[rows.stop - 1]]) for rows in self._groups(sizes, empty)]
        return torch.cat(parts).index_select(0, torch.argsort(ordered)).index_select(0, place)

    def _groups(self, lengths: list[int], start: int) -> Iterator[slice]:
        """Divide texts from `start` on, sorted by length, into groups that fit `TOKENS`; a longer text is alone."""
        most = TOKENS.get(self._device.type, TOKENS["cuda"])
        for stop in range(start + 1, len(lengths) + 1):
            if stop == len(lengths) or (stop + 1 - start) * lengths[stop] > most:
                yield slice(start, stop)
                start = stop

    def _vectors(self, tokens: Tensor) -> Tensor:
        mask = tokens > 0
        ids = torch.where(mask, tokens - 1, self.description.pad).long()
        states = self.model(input_ids=ids, attention_mask=mask.long(), return_dict=True).last_hidden_state.float()
        return F.normalize(_pooled(states, mask, self.description.pooling), dim=-1)

    def _nothing(self, rows: int) -> Tensor:
        """Return zeros for a step without any text.

        In training, the zeros depend on the weights, which therefore have a zero gradient and not none: all ranks must
        have gradients of the same weights.
        """
        zeros = torch.zeros(rows, self.width, device=self._device)
        if not (rows and self.training):
            return zeros
        one = torch.ones(1, 1, dtype=torch.int64, device=self._device)
        return zeros + 0.0 * self._vectors(one)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


def _transformer(encoder: TokenEncoder, *, is_empty: bool) -> nn.Module:
    """Build the transformer: pretrained, or with random weights if a state dict with all weights will be loaded."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415  # slow to import, and an extra

    described = encoder.model
    config = AutoConfig.for_model(**described.config)
    config.use_cache = False  # decoders use the cache only to generate text
    kind: Any = AutoModel._model_mapping[type(config)]
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    options: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": attention}
    if "add_pooling_layer" in inspect.signature(kind).parameters:
        options["add_pooling_layer"] = False  # its output is not used, so it would not be trained
    if is_empty or (described.folder is None and encoder.declared.train == "full"):
        built: nn.Module = AutoModel.from_config(config, **options)
    else:
        folder = described.weights_folder()
        built = AutoModel.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, dtype=torch.float32, **options
        )
    return built.float().train()  # a pretrained model starts in evaluation mode


def _add_updates(model: nn.Module, encoder: TokenEncoder) -> None:
    """Freeze all weights of a transformer, and add low-rank updates to all its linear layers, in place."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  # slow to import, and an extra

    declared = encoder.declared
    settings = LoraConfig(
        r=declared.lora_rank,
        lora_alpha=declared.lora_alpha,
        lora_dropout=declared.lora_dropout,
        target_modules="all-linear",
    )
    inject_adapter_in_model(settings, model)


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool the token vectors, [M, L, width], at the positions where `mask`, [M, L], is true -> [M, width]."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        last = mask.sum(1) - 1
        return states[torch.arange(len(states), device=states.device), last]
    if pooling == "max":
        return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    count = mask.sum(1, keepdim=True).to(states.dtype)
    total = (states * mask[:, :, None]).sum(1)
    return total / (count.sqrt() if pooling == "mean_sqrt_len_tokens" else count)


def _leave_out_fixed(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Remove from a state dict the weights that training does not change."""
    assert isinstance(module, TextTransformer)
    for name in module.fixed:
        state.pop(f"{prefix}{name}", None)


def _keep_fixed(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the module's own weights where a state dict leaves them out, so that loading it keeps them."""
    assert isinstance(module, TextTransformer)
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name in module.fixed:
        state.setdefault(f"{prefix}{name}", own[name].detach())


def text_transformers(model: nn.Module) -> list[TextTransformer]:
    """Return the text encoders of a model, each once."""
    return [module for module in model.modules() if isinstance(module, TextTransformer)]


def text_encoder_for(encoder: TokenEncoder, made: dict[Any, TextTransformer]) -> TextTransformer:
    """Return the encoder of a text feature: one of `made` with the same model and settings, or else a new one.

    A new encoder that may be shared is added to `made`.

    Args:
        encoder: the settings of the feature and the description of its model.
        made: the encoders of the towers so far, by model and settings; changed in place.
    """
    declared, described = encoder.declared, encoder.model
    lora = (declared.lora_rank, declared.lora_alpha, declared.lora_dropout) if declared.train == "lora" else ()
    key: Any = (described.sha256, described.pooling, declared.train, lora, declared.gradient_checkpointing)
    if not declared.share:
        return TextTransformer(encoder)
    if key not in made:
        made[key] = TextTransformer(encoder)
    return made[key]
