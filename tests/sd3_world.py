"""A tiny Stable Diffusion 3 of random components of the real classes, a random LoRA for it, and pipelines of them."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipeline_world import World, lora_config
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipeline_spf_portrait_3 import SPFPortrait3Pipeline
from prompts import locate_in_two_parts


TOKENIZERS = Path(__file__).resolve().parents[1] / "toy_portraits" / "base_model_xl"
JOINT_ATTENTION = r"transformer_blocks\.\d+\.attn\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)"
WORDS = "a woman man green red purple blue jacket hat hair background blonde , with the"
T5_WIDTH = 32


def make_t5_tokenizer(length: int = 512) -> T5Tokenizer:
    """A real T5 tokenizer: each of `WORDS` is one token, any other word is spelled in letters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocab += [(f"▁{word}", -3.0) for word in WORDS.split()]
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab += [(letter, -8.0) for letter in letters + letters.upper() + "0123456789,.!?'-:;"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def make_transformer(**config) -> SD3Transformer2DModel:
    """Of SD3.5-medium's kind: normed queries and keys, and a second attention in the first blocks."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "pos_embed_max_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 4}
    widths = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    told = {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": 8 + 10}
    kind = {"patch_size": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    return SD3Transformer2DModel(**{**sizes, **widths, **told, **kind, **config}).eval()


def make_sd3_components(with_t5: bool = True, **config) -> dict:
    """What `StableDiffusion3Pipeline` is made of, without T5 if asked; `config` is of the transformer."""
    transformer = make_transformer(**config)
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, shift_factor=0.1, scaling_factor=1.5,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    components = {"transformer": transformer, "vae": vae.eval(), "text_encoder_3": None, "tokenizer_3": None}
    for number, (name, width, projection) in enumerate((("", 16, 8), ("_2", 12, 10))):
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / f"tokenizer{name}")
        text_config = CLIPTextConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
            projection_dim=projection, vocab_size=len(tokenizer), initializer_factor=3.0,
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(2 + number)
        components[f"text_encoder{name}"] = CLIPTextModelWithProjection(text_config).eval()
        components[f"tokenizer{name}"] = tokenizer
    if with_t5:
        tokenizer = make_t5_tokenizer()
        t5_config = T5Config(
            vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, num_heads=2, d_ff=32, num_layers=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(4)
        components |= {"text_encoder_3": T5EncoderModel(t5_config).eval(), "tokenizer_3": tokenizer}
    return components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)}


def joint_lora(**kwargs) -> LoraConfig:
    return lora_config(JOINT_ATTENTION, **kwargs)


def write_sd3(folder: Path, with_t5: bool = True, **config) -> Path:
    """Write the whole pipeline as a folder; without T5, diffusers loads it where that is said once more:
    `from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`.
    """
    StableDiffusion3Pipeline(**make_sd3_components(with_t5, **config)).save_pretrained(folder)
    return folder


def write_sd3_lora(folder: Path, seed: int = 0, modules: str = JOINT_ATTENTION, **config) -> Path:
    """Write a random LoRA for that transformer, strong enough to be seen, in diffusers' format."""
    transformer = make_transformer(**config)
    torch.manual_seed(seed)
    transformer.add_adapter(lora_config(modules))
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder


class SD3World(World):
    """Ours and the stock pipeline with the LoRA in the transformer, and the stock one without it."""

    classes = SPFPortrait3Pipeline, StableDiffusion3Pipeline
    denoiser, attention = "transformer", JOINT_ATTENTION
    steps = 5  # the last of them is short

    def __init__(self, with_t5=True, lora=True, **config):
        super().__init__(None, lora, with_t5=with_t5, **config)

    @staticmethod
    def make_components(tokenizer, **arguments):
        return make_sd3_components(**arguments)

    @staticmethod
    def conditions(pipeline, text, size=None):
        states, _, pooled, _ = pipeline.encode_prompt(text, None, None, "cpu", 1, False)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(self, pipeline, text, latents, timestep, size=None):
        rows = {"hidden_states": latents, "timestep": timestep.expand(len(latents))}
        return pipeline.transformer(**rows, **self.conditions(pipeline, text)).sample

    def locate(self, pair):
        tokenizers = [self.ours.tokenizer, self.ours.tokenizer_2]
        return locate_in_two_parts(pair, tokenizers, self.ours.tokenizer_3, 256), 32 + 256

    def noise_ratio(self, timestep):
        sigma = float(timestep) / 1000
        return sigma / max(1 - sigma, 2**-12)

    def scale(self, timestep):
        return max(1 - float(timestep) / 1000, 2**-12)

    @staticmethod
    def clip_embeds(pipeline, texts):
        ids = pipeline.tokenizer_2(texts, padding="max_length", return_tensors="pt").input_ids
        return pipeline.text_encoder_2(ids).text_embeds
