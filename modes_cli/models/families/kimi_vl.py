"""Kimi-VL: MoonViT and a two-layer projector before transformers' DeepSeek-V3 text model.

transformers has no class for model type `kimi_vl`, and the code that comes with the checkpoints was written for
transformers 4. Modules have the names of the checkpoints' tensors; only the experts, which the files hold one by one, are
stacked while they are loaded, by the conversion that transformers has for its DeepSeek-V3.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast

from modes_cli.models.families.moonvit import MoonViT, MoonViTConfig, MoonViTPositionEmbedding

# What DeepSeek-V3's configurations can say and transformers' class does not do in any other way.
_FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


class KimiVLConfig(PreTrainedConfig):
    """config.json of the checkpoints as it is.

    Raises:
        ValueError: a kind of routing that DeepSeek-V3's class does not compute.
    """

    model_type = "kimi_vl"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": DeepseekV3Config,
        "vision_config": MoonViTConfig,
    }
    attribute_map = {"image_token_id": "media_placeholder_token_id"}  # noqa: RUF012

    text_config: Any = None  # a DeepseekV3Config, or what it is made from
    vision_config: Any = None  # a MoonViTConfig, or what it is made from
    media_placeholder_token_id: int = 163605
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self.sub_configs.items():
            given: Any = getattr(self, name)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, name, kind(**{key: value for key, value in (given or {}).items() if key != "model_type"}))
        for name, known in _FIXED.items():
            value = getattr(self.text_config, name, known)
            if value != known:
                raise ValueError(f"Kimi-VL with {name} `{value}`; known is `{known}`")
        super().__post_init__(**kwargs)


class KimiVLProjector(nn.Module):
    """forward(merged patches [M, patches per token, vision size]) -> [M, text size]."""

    def __init__(self, config: KimiVLConfig) -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        rows, columns = vision.merge_kernel_size
        size = vision.hidden_size * rows * columns
        self.pre_norm = nn.LayerNorm(vision.hidden_size, eps=1e-5)
        self.linear_1 = nn.Linear(size, size)
        self.linear_2 = nn.Linear(size, text.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(self.pre_norm(patches).flatten(1))))
        return out


class KimiVLPreTrainedModel(PreTrainedModel):
    config: KimiVLConfig
    config_class = KimiVLConfig
    base_model_prefix = ""
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["MoonViTBlock", "DeepseekV3DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012  (computed, whatever a file holds)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoonViTPositionEmbedding):
            init.normal_(module.weight, mean=0.0, std=self.config.get_text_config().initializer_range)


class KimiVLForConditionalGeneration(KimiVLPreTrainedModel, GenerationMixin):
    """Kimi-VL with its language model head. Shapes: B batch, S tokens, P patches, M image tokens, V vocabulary."""

    def __init__(self, config: KimiVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = MoonViT(config.vision_config)
        self.multi_modal_projector = KimiVLProjector(config)
        self.language_model = DeepseekV3ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        decoder: nn.Module = self.language_model.model
        return decoder

    def get_image_features(self, pixel_values: Tensor, image_grid_hws: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """What replaces the placeholders' embeddings.

        Args:
            pixel_values: [P, 3, patch, patch].
            image_grid_hws: [images, 2] int64: rows and columns of patches of each image.

        Returns:
            `pooler_output`: for each image [its tokens, H].
        """
        merged = self.vision_tower(pixel_values.to(self.vision_tower.patch_embed.proj.weight.dtype), image_grid_hws)
        features = self.multi_modal_projector(merged)
        tokens = (image_grid_hws.prod(-1) // merged.shape[1]).tolist()
        return BaseModelOutputWithPooling(last_hidden_state=merged, pooler_output=features.split(tokens))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hws: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, S or `logits_to_keep`, V] and the cache, as DeepSeek-V3 gives them.

        Args:
            input_ids: [B, S], the placeholder at every image token; or `inputs_embeds` [B, S, H].
            pixel_values, image_grid_hws: as `get_image_features` takes them, images in reading order of the batch.
            mm_encoder_outputs: {"image": what `get_image_features` returned} in place of the pixels.

        Raises:
            ValueError: the prompt has another number of placeholders than the images have tokens.
        """
        embeddings = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = embeddings(input_ids)
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            if image_grid_hws is None:
                raise ValueError("`pixel_values` without `image_grid_hws`")
            encoded = self.get_image_features(pixel_values, image_grid_hws)
        if encoded is not None:
            features = torch.cat(list(encoded.pooler_output)).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(self._places(input_ids, inputs_embeds, len(features)), features)
        output: MoeCausalLMOutputWithPast = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return output

    def _places(self, input_ids: Tensor | None, embeds: Tensor, features: int) -> Tensor:
        """Where image features go: [B, S, 1] bool."""
        placeholder = torch.tensor(self.config.media_placeholder_token_id, device=embeds.device)
        if input_ids is not None:
            places = input_ids.to(embeds.device) == placeholder
        else:
            places = (embeds == self.get_input_embeddings()(placeholder)).all(-1)
        if int(places.sum()) != features:
            raise ValueError(f"the prompt has `{int(places.sum())}` image placeholders, the images have `{features}` tokens")
        return places[..., None]
