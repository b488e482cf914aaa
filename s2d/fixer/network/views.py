"""Self-attention over several views: the UNet that looks at a reference photo while it repairs a render.

The views of one sample stand one after another in the batch, [B·V, ...]. In every self-attention layer their tokens are
joined, [B·V, N, D] → [B, V·N, D]; everything else (convolutions, text attention, feed-forward) sees them apart. There are no
new weights, so any checkpoint of the plain UNet fits, and with V = 1 the network is the plain one.
"""

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor


class MultiViewSelfAttention(AttnProcessor2_0):
    """Joins the tokens of the views of each sample. The number of views comes with the call: the processor has no state,
    so that gradient checkpointing recomputes the same thing and two networks cannot disturb each other."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,  # [B·V, N, D]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Attend within each group of `num_views` consecutive batch entries. [B·V, N, D]"""
        assert encoder_hidden_states is None and attention_mask is None, "self-attention only"
        shape = hidden_states.shape
        joined = hidden_states.reshape(shape[0] // num_views, num_views * shape[1], shape[2])
        return super().__call__(attn, joined, temb=temb).reshape(shape)


class TextAttention(AttnProcessor2_0):
    """The stock attention to the prompt. diffusers hands `num_views` to every processor; this one has no use for it."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,  # [B·V, N, D]
        encoder_hidden_states: Tensor | None = None,  # [B·V, L, D']
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Attend to the prompt, each view for itself. [B·V, N, D]"""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class MultiViewUNet(UNet2DConditionModel):
    """diffusers' UNet with the two processors set; names and shapes of its weights are the stock ones."""

    def __init__(self, **config) -> None:
        super().__init__(**config)
        # diffusers calls a transformer block's self-attention attn1 and its attention to the prompt attn2.
        self.set_attn_processor(
            {
                name: MultiViewSelfAttention() if ".attn1." in name else TextAttention()
                for name in self.attn_processors
            }
        )

    def predict(
        self,
        latents: Tensor,  # [B, V, c, h, w]
        timestep: int,
        prompt: Tensor,  # [L, D']
    ) -> Tensor:
        """Predict the noise in every view. [B, V, c, h, w]"""
        num_samples, num_views = latents.shape[:2]
        noise = self(
            latents.flatten(0, 1),
            timestep,
            prompt.expand(num_samples * num_views, -1, -1),
            cross_attention_kwargs={"num_views": num_views},
            return_dict=False,
        )[0]
        return noise.unflatten(0, (num_samples, num_views))
