"""A batch of chats about photographs, as a vision-language model gets it: token ids with placeholders, and patches.

Everything comes out of installed packages, nothing is downloaded: the photographs ship with scikit-learn and
scikit-image, the tokenizer (Tekken, with Pixtral's image tokens) with mistral-common. Pixtral writes a picture
of h x w patches as h lines of w [IMG] placeholders, each line closed by [IMG_BREAK], the last one by [IMG_END].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from torch import Tensor

PATCH = 16  # pixels a side
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Photo:
    """A picture of a chat: its name, and how many patches its longer side gets."""

    name: str
    patches: int


# one chat a sample: turns of (what the user sends, what the assistant answers); two of them have no picture
CHATS = (
    [
        ([Photo("china", 36), "What kind of building is this?"],
         "A pagoda with several storeys, one smaller than the other, and green and yellow glazed tiles on its roofs. "
         "The columns are red. It stands on a hill among trees, high above a wide lake."),
        (["Is there anything on the water?"], "Yes, a few boats, and an island far out."),
    ],
    [
        ([Photo("flower", 24), "and", Photo("chelsea", 22), "What do these two have in common?"],
         "Both show one subject close up before a blurred background, and both are orange."),
    ],
    [
        (["How many days are there in a leap year?"], "366."),
    ],
    [
        (["Explain to a child why there are leap years at all. Take your time."],
         "A year is the time that the earth needs to go once around the sun. A day is the time that it needs to turn "
         "once around itself. Nobody has made these two fit: while the earth goes around the sun it turns 365 times "
         "and then about a quarter of a turn more. If every year had 365 days, we would lose that quarter each time. "
         "After four years we would be a whole day early, after a hundred years nearly a month, and one day the snow "
         "would fall in what the calendar calls July.\n\nSo we save the quarters up. After four years they make a "
         "day, and we put it at the end of February, the shortest month. That year has 366 days. It is a little too "
         "much, though, because the rest is not quite a quarter, and that is why most years that end in two zeros go "
         "without: 1900 was no leap year, 2100 will be none. But 2000 was one, since every fourth of them keeps its "
         "day after all."),
        (["And who found that out?"],
         "The quarter was known in Egypt long before our calendar. Julius Caesar gave Rome a leap year every four "
         "years, on the advice of Sosigenes, an astronomer from Alexandria. The rule about the hundreds came in 1582 "
         "under Pope Gregory XIII: by then spring had moved by ten days, and ten days were left out to mend it."),
    ],
    [
        ([Photo("motorcycle_left", 26), Photo("motorcycle_right", 26), "Which one was taken from further left?"],
         "The first. Things that stand near have moved to the left in the second picture."),
    ],
    [
        ([Photo("page", 24), "Read the heading, please."], "Region-based segmentation"),
        (["And what are markers, in the words of the page?"],
         "Pixels that we can label unambiguously as either object or background. On this page they are found at the "
         "two extreme parts of the histogram of grey values."),
    ],
    [
        (["Where does the word espresso come from?", Photo("coffee", 12)],
         "From Italian: coffee pressed out, made at once for the one who asks. The cup in the picture holds one."),
    ],
    [
        ([Photo("rocket", 16), Photo("hubble_deep_field", 20), Photo("retina", 8), "One line for each picture."],
         "A rocket between four lightning towers at dusk.\nThousands of galaxies.\nThe back of an eye."),
    ],
    [
        ([Photo("coins", 16), "How many coins are there, and how are they laid out?"],
         "24, in four rows of six. They are of different sizes, and all of them are worn."),
        (["Thank you."], "You are welcome."),
    ],
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChatBatch:
    """B chats, padded on the left to T tokens (the way nanoVLM did it), and the patches of their I pictures."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 0 = padding
    labels: Tensor  # (B, T) int64, -100 where nothing is to be learnt: all but the assistant's words
    patches: list[Tensor]  # I x (patches of the picture, 3 * PATCH * PATCH) fp32, in reading order
    photos: list[np.ndarray]  # I x (height, width, 3) uint8: the pictures as they came
    image_token_id: int
    vocabulary: int

    @property
    def image_rows(self) -> int:
        return sum(len(patches) for patches in self.patches)


def load_photo(photo: Photo) -> Image.Image:
    """The picture from its package, made so large that its longer side has `photo.patches` patches."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    if photo.name in ("china", "flower"):
        pixels = load_sample_image(f"{photo.name}.jpg")
    elif photo.name.startswith("motorcycle"):
        pixels = skimage.data.stereo_motorcycle()[photo.name.endswith("right")]
    else:
        pixels = getattr(skimage.data, photo.name)()
    image = Image.fromarray(pixels).convert("RGB")
    scale = photo.patches * PATCH / max(image.size)
    return image.resize([max(PATCH, round(side * scale)) for side in image.size])


def load_tokenizer() -> MistralTokenizer:
    """Tekken with image tokens, as Pixtral uses it."""
    path = files("mistral_common") / "data" / "tekken_240911.json"
    return MistralTokenizer.from_file(str(path), mode=ValidationMode.finetuning)


def special_token(tokenizer: MistralTokenizer, name: str) -> int:
    return tokenizer.instruct_tokenizer.tokenizer.get_special_token(name)


def load_chats(chats=CHATS, *, progress=iter) -> ChatBatch:
    """Tokenizes the chats and cuts their pictures into patches.

    Args:
        chats: as CHATS. Default: all of them.
        progress: wraps the iterable of chats, for a progress bar. Default: none.
    """
    tokenizer = load_tokenizer()
    rows, photos, patches = [], [], []
    for chat in progress(chats):
        messages = []
        for said, answer in chat:
            pictures = {part: load_photo(part) for part in said if isinstance(part, Photo)}
            photos += [np.asarray(picture) for picture in pictures.values()]
            chunks = [
                ImageChunk(image=pictures[part]) if part in pictures else TextChunk(text=part) for part in said
            ]
            messages += [UserMessage(content=chunks), AssistantMessage(content=answer)]
        encoded = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages))
        rows.append(torch.tensor(encoded.tokens))
        patches += [cut(torch.from_numpy(pixels)) for pixels in encoded.images]

    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), special_token(tokenizer, "<pad>"))
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    attention_mask = torch.zeros_like(input_ids)
    for b, row in enumerate(rows):
        start = length - len(row)
        input_ids[b, start:] = row
        attention_mask[b, start:] = 1
        learnt = answers(row, special_token(tokenizer, "[/INST]"), special_token(tokenizer, "</s>"))
        labels[b, start:] = torch.where(learnt, row, IGNORE_INDEX)
    return ChatBatch(
        input_ids, attention_mask, labels, patches, photos,
        image_token_id=special_token(tokenizer, "[IMG]"), vocabulary=tokenizer.instruct_tokenizer.tokenizer.n_words,
    )  # fmt: skip


def cut(pixels: Tensor) -> Tensor:
    """(3, h, w) pixels -> (patches, 3 * PATCH * PATCH), line by line."""
    channels = len(pixels)
    lines = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, h / PATCH, w / PATCH, PATCH, PATCH]
    return lines.permute(1, 2, 0, 3, 4).reshape(-1, channels * PATCH * PATCH).float()


def answers(row: Tensor, begin: int, end: int) -> Tensor:
    """True at the assistant's tokens: after each `begin`, up to and with the next `end`."""
    begun, ended = (row == begin).cumsum(0), (row == end).cumsum(0)
    inside = begun > ended - (row == end).long()
    return inside & (row != begin)


@functools.cache
def embed(batch: ChatBatch, hidden: int, dtype: torch.dtype, device="cpu") -> tuple[Tensor, list[Tensor]]:
    """An embedding table (vocabulary, hidden) and the embedded patches of every picture, from a fixed seed.

    The patch embedding is one linear layer, as in a vision transformer; the rows of the pictures are views of one
    tensor, as a vision encoder that works on all pictures of a batch leaves them. Made once for the same arguments.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(batch.vocabulary, hidden, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    projection = torch.empty(hidden, 3 * PATCH * PATCH).normal_(0, 0.001, generator=generator)
    features = (torch.cat(batch.patches) @ projection.T).to(device, dtype)
    return weight.to(device, dtype), list(features.split([len(patches) for patches in batch.patches]))
