"""What the families with a U-Net over the latents of a KL autoencoder share."""

from dbtrain.models.family import Codec, encode_images, latent_scale

UNET = "diffusers:UNet2DConditionModel"
CODEC = Codec(channels=4, cell=8, encode=encode_images, scale=latent_scale)
SAMPLERS = {"ddpm": "DDPMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")


def text_path(path: str) -> str:
    """A CLIP layer's path as kohya writes it. transformers >= 5.6 dropped `text_model.`; kohya keeps it."""
    return path if path.startswith("text_model.") else f"text_model.{path}"
