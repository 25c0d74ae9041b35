"""PyTorch's networks for a file of weights that jaxsms wrote, of any widths.

    network = load("soup.pt")  # images [batch, channels, height, width] -> logits

The layers have the shapes of the weights. What shapes do not tell lies beside the weights
as buffers: by how much a shortcut is padded, and the heads of an attention.
"""

import torch
import torch.nn.functional as F
from torch import nn


def load(path):
  """The network of a state dict in a PyTorch or safetensors file, for inference."""
  if str(path).endswith(".safetensors"):
    from safetensors.torch import load_file

    state = load_file(path)
  else:
    state = torch.load(path, map_location="cpu", weights_only=True)
  network = make(state)
  network.load_state_dict(state)
  return network.eval()


def make(state):
  """The network that the names in a state dict tell; its weights are not loaded yet."""
  if "patch_embed.proj.weight" in state:
    return ViT(state)
  if "features.0.weight" in state:
    return VGG(state)
  if "layer1.0.conv1.weight" in state:
    return Residual(state)
  return MLP(state)


def conv(state, name, stride=1, padding=None):
  """A square convolution."""
  outputs, inputs, size, _ = state[f"{name}.weight"].shape
  padding = size // 2 if padding is None else padding
  bias = f"{name}.bias" in state
  return nn.Conv2d(inputs, outputs, size, stride, padding, bias=bias)


def linear(state, name):
  """A dense layer."""
  outputs, inputs = state[f"{name}.weight"].shape
  return nn.Linear(inputs, outputs)


def norm(state, name):
  """Batch normalization."""
  return nn.BatchNorm2d(len(state[f"{name}.weight"]))


class MLP(nn.Module):
  """Dense layers fc1, fc2, ... with ReLU between them."""

  def __init__(self, state):
    super().__init__()
    self.number = sum(name.endswith(".weight") for name in state)
    for i in range(1, self.number + 1):
      setattr(self, f"fc{i}", linear(state, f"fc{i}"))

  def forward(self, images):
    x = images.flatten(1)
    for i in range(1, self.number):
      x = F.relu(getattr(self, f"fc{i}")(x))
    return getattr(self, f"fc{self.number}")(x)


class VGG(nn.Module):
  """Convolutions with normalization and ReLU; a gap in their numbers is a maximum."""

  def __init__(self, state):
    super().__init__()
    names = [name.split(".") for name in state if name.startswith("features.")]
    numbers = {int(n) for _, n, _ in names}
    convolutions = {n for n in numbers if state[f"features.{n}.weight"].ndim == 4}
    self.features = nn.Sequential()
    for n in range(max(numbers) + 3):
      if n in convolutions:
        layer = conv(state, f"features.{n}")
      elif n in numbers:
        layer = norm(state, f"features.{n}")
      else:
        layer = nn.ReLU() if n - 2 in convolutions else nn.MaxPool2d(2)
      self.features.append(layer)
    self.classifier = linear(state, "classifier")

  def forward(self, images):
    return self.classifier(self.features(images).mean((2, 3)))


class Residual(nn.Module):
  """Residual networks: basic, bottleneck and wide blocks, of three or four stages."""

  def __init__(self, state):
    super().__init__()
    self.large = state["conv1.weight"].shape[-1] == 7
    self.conv1 = conv(state, "conv1", 2 if self.large else 1)
    self.bn1 = norm(state, "bn1")
    # Only wide blocks are normalized before their convolutions, which have biases.
    self.before = "layer1.0.conv1.bias" in state
    places = {tuple(name.split(".")[:2]) for name in state if name.startswith("layer")}
    self.stages = max(int(stage[5:]) for stage, _ in places)
    for s in range(1, self.stages + 1):
      blocks = sum(stage == f"layer{s}" for stage, _ in places)
      stage = [
        Block(state, f"layer{s}.{i}", 2 if s > 1 and i == 0 else 1, self.before)
        for i in range(blocks)
      ]
      setattr(self, f"layer{s}", nn.Sequential(*stage))
    self.head = "fc" if "fc.weight" in state else "linear"
    setattr(self, self.head, linear(state, self.head))

  def forward(self, images):
    x = self.conv1(images)
    x = x if self.before else F.relu(self.bn1(x))
    x = F.max_pool2d(x, 3, 2, 1) if self.large else x
    for s in range(1, self.stages + 1):
      x = getattr(self, f"layer{s}")(x)
    x = F.relu(self.bn1(x)) if self.before else x
    return getattr(self, self.head)(x.mean((2, 3)))


class Block(nn.Module):
  """Two or three convolutions and a shortcut: as it is, projected, or padded with zeros."""

  def __init__(self, state, name, stride, before):
    super().__init__()
    self.before, self.stride = before, stride
    self.number = 3 if f"{name}.conv3.weight" in state else 2
    strided = 2 if self.number == 3 or before else 1
    for i in range(1, self.number + 1):
      one = conv(state, f"{name}.conv{i}", stride if i == strided else 1)
      setattr(self, f"conv{i}", one)
      setattr(self, f"bn{i}", norm(state, f"{name}.bn{i}"))
    for kind in ("shortcut", "downsample"):
      if f"{name}.{kind}.0.weight" in state:
        layers = [conv(state, f"{name}.{kind}.0", stride)]
        if f"{name}.{kind}.1.weight" in state:
          layers.append(norm(state, f"{name}.{kind}.1"))
        setattr(self, kind, nn.Sequential(*layers))
    if f"{name}.pads" in state:
      self.register_buffer("pads", torch.zeros(2, dtype=torch.int64))

  def forward(self, x):
    y = x
    for i in range(1, self.number + 1):
      convolution, normal = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
      if self.before:
        y = convolution(F.relu(normal(y)))
      else:
        y = normal(convolution(y))
        y = F.relu(y) if i < self.number else y
    shortcut = getattr(self, "shortcut", getattr(self, "downsample", None))
    if shortcut is not None:
      x = shortcut(x)
    elif hasattr(self, "pads"):
      x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pads.tolist()))
    return x + y if self.before else F.relu(x + y)


class ViT(nn.Module):
  """A Vision Transformer: the class token after all blocks."""

  def __init__(self, state):
    super().__init__()
    size = state["patch_embed.proj.weight"].shape[-1]
    self.patch_embed = nn.Module()
    self.patch_embed.proj = conv(state, "patch_embed.proj", size, 0)
    self.cls_token = nn.Parameter(torch.zeros(state["cls_token"].shape))
    self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    blocks = [TransformerBlock(state, f"blocks.{i}") for i in range(depth)]
    self.blocks = nn.Sequential(*blocks)
    self.norm = nn.LayerNorm(len(state["norm.weight"]), eps=1e-6)
    self.head = linear(state, "head")

  def forward(self, images):
    x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
    return self.head(self.norm(self.blocks(x)[:, 0]))


class TransformerBlock(nn.Module):
  """Attention, then two dense layers, each normalized before and added to its input."""

  def __init__(self, state, name):
    super().__init__()
    self.norm1 = nn.LayerNorm(len(state[f"{name}.norm1.weight"]), eps=1e-6)
    self.norm2 = nn.LayerNorm(len(state[f"{name}.norm2.weight"]), eps=1e-6)
    self.attn, self.mlp = nn.Module(), nn.Module()
    for part in ("q", "k", "v", "proj"):
      setattr(self.attn, part, linear(state, f"{name}.attn.{part}"))
    self.attn.register_buffer("heads", torch.ones((), dtype=torch.int64))
    self.attn.register_buffer("scale", torch.ones(()))
    self.mlp.fc1, self.mlp.fc2 = (linear(state, f"{name}.mlp.fc{i}") for i in (1, 2))

  def forward(self, x):
    x = x + self.attention(self.norm1(x))
    return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

  def attention(self, x):
    attn, heads = self.attn, int(self.attn.heads)
    q, k, v = (
      part(x).unflatten(-1, (heads, -1)).transpose(1, 2)
      for part in (attn.q, attn.k, attn.v)
    )
    weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))
