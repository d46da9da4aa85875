"""Documents of a family, each alone and all in one row: what transformers calls packed, restarting positions and no mask."""

from __future__ import annotations

import inspect

import torch

import vlm_fuse
from families.batches import maker_of, placeholder, rows_of
from families.registry import Family
from transformers_release import RELEASE

#: isolated by transformers 5.23 itself, where position_ids begin anew and neither a mask nor a cache is given
ISOLATED = (
    "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "idefics3", "internvl", "mistral3", "glm4v", "aya_vision", "gemma4",
    "llava_next", "llava_onevision", "vipllava", "lighton_ocr", "ovis2", "llama4", "glm46v", "paddleocr_vl",
)  # fmt: skip
#: not isolated by it
LEAKING = ("gemma3", "gemma4_vision", "paligemma", "molmo2", "qwen3_5", "qwen3_5_moe", "lfm2_vl")
#: of each document the parts: words, and "image". Images stand at both ends of documents, and on both sides of a boundary.
DOCUMENTS = [["image", 11, 12, "image"], ["image", 13], [14, 15, 16], [17, "image"], ["image"]]


class Documents:
    """`alone[i]` and `packed`: keyword arguments of the model. `lengths` of the documents."""

    def __init__(self, model, family: Family, documents=DOCUMENTS):
        self.model, self.family = model, family
        token, number, made = placeholder(model, "image"), 0, []
        for parts in documents:
            ids, numbers = [], []
            for part in parts:
                if part == "image":
                    ids += [token] * rows_of(model, family, "image", number % 2)
                    numbers.append(number % 2)
                    number += 1
                else:
                    ids.append(part)
            made.append((ids, numbers))
        self.lengths = [len(ids) for ids, _ in made]
        self.token = token
        #: GLM-4V of transformers 4 takes no positions of the text, and beside its three rows of positions always a mask
        self.only_three = RELEASE < (5, 0) and model.config.model_type == "glm4v"
        self.alone = [self._inputs([one]) for one in made]
        if self.only_three:
            self.alone = [one | {"attention_mask": torch.ones_like(one["input_ids"])} for one in self.alone]
        self.packed = self._inputs(made)

    def _inputs(self, documents: list) -> dict:
        ids = torch.tensor([[token for own, _ in documents for token in own]])
        numbers = [number for _, own in documents for number in own]
        made = {"input_ids": ids, "use_cache": False}
        if numbers:
            made |= maker_of(self.family, "image")(self.model.config, numbers)
        taken = inspect.signature(self.model.forward).parameters
        types = (ids == self.token).int()
        made |= {name: types for name in ("mm_token_type_ids",) if name in taken}
        if "token_type_ids" in taken:  # PaliGemma's tell prompts from answers: images and the first word are the prompt
            prefix = torch.cat([(torch.tensor(own) == self.token) | (torch.arange(len(own)) == own.index(min(own))) for own, _ in documents])[None]
            made["token_type_ids"] = types if self.model.config.model_type.startswith("gemma") else (~prefix).int()
        made["position_ids"] = self._positions(documents, types, made.get("image_grid_thw"))
        return made

    def _positions(self, documents: list, types: torch.Tensor, grids) -> torch.Tensor:
        first = 1 if self.model.config.model_type == "paligemma" else 0
        if grids is None or not hasattr(getattr(self.model, "model", self.model), "get_rope_index"):
            return torch.cat([torch.arange(len(own)) for own, _ in documents])[None] + first
        own = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor([len(ids) for ids, _ in documents]))[None]
        merge = self.model.config.vision_config.spatial_merge_size
        rows = vlm_fuse.mrope_position_ids(types, image_grid_thw=grids, document_ids=own, spatial_merge_size=merge)[0]
        return rows[1:] if self.only_three else rows

    def with_another_first(self) -> dict:
        """The packed row with one word of the first document changed."""
        ids = self.packed["input_ids"].clone()
        ids[0, (ids[0] == 11).nonzero()[0, 0]] = 30
        return self.packed | {"input_ids": ids}
