"""Cut networks in files: read again, in PyTorch, and as programs."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from cut_networks import masks_of, random_kept

from jaxsms import channel_groups, compact, export, models, pretrained
from jaxsms.disk.safetensors import save_safetensors, write_safetensors

KEY = jax.random.key(0)
NETWORKS = {
  "mlp": ("mlp", {"hidden": (12, 9)}, (4, 4, 2)),
  "resnet8": ("resnet8", {"width": 4}, (8, 8, 3)),
  "resnet18": ("resnet18", {"width": 4}, (8, 8, 3)),
  "resnet50": ("resnet50", {"width": 2}, (32, 32, 3)),
  "vgg16": ("vgg16", {"width": 4}, (32, 32, 3)),
  "wide_resnet22_10": ("wide_resnet22_10", {"widening": 1}, (8, 8, 3)),
  "vit_tiny": ("vit_tiny", {"depth": 1, "width": 12}, (8, 8, 3)),
}
SLOW = ("resnet18", "resnet50", "vgg16", "wide_resnet22_10")
EACH = [
  pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS
]


def made(name):
  """A network with half of its channels cut, and the function of the full one."""
  model, options, image_shape = NETWORKS[name]
  if model != "mlp":
    options = {**options, "convolution": jax.lax.conv_general_dilated}
  module = models.create(model, 5, **options)
  images = np.random.default_rng(0).standard_normal((3, *image_shape), np.float32)
  shapes = jax.eval_shape(module.init, KEY, images)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: (
      rng.uniform(0.1, 0.5, x.shape).astype(x.dtype)
      if len(x.shape) == 1
      else 0.3 * rng.standard_normal(x.shape).astype(x.dtype)
    ),
    {"batch_stats": {}, **shapes},
  )

  def apply(variables, images):
    return module.apply(variables, images, train=False)

  groups = channel_groups(apply, variables, images)
  masks = masks_of(variables, groups, random_kept(groups))
  return module, compact(apply, variables, masks, images), apply, images


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


@pytest.mark.parametrize("name", EACH)
def test_pytorch_computes_the_cut_network(name, tmp_path):
  torch = pytest.importorskip("torch")
  module, network, _, images = made(name)
  state = export.cut_to_torch(network, module, images.shape[1:])
  path = tmp_path / "soup.pt"
  torch.save({k: torch.from_numpy(np.array(x)) for k, x in state.items()}, path)
  (tmp_path / "networks.py").write_text(export.torch_module())
  spec = importlib.util.spec_from_file_location("networks", tmp_path / "networks.py")
  networks = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(networks)
  with torch.no_grad():
    found = networks.load(path)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  expected = np.asarray(jax.jit(network.apply)(network.params, images))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_a_cut_network_is_read_again_and_starts_a_run(tmp_path):
  module, network, apply, images = made("resnet8")
  path = tmp_path / "cut.safetensors"
  export.save_cut(path, network)
  again = export.load_cut(path, apply)
  assert jax.tree.map(np.shape, again.params) == jax.tree.map(np.shape, network.params)
  expected = jax.jit(network.apply)(network.params, images)
  np.testing.assert_array_equal(jax.jit(again.apply)(again.params, images), expected)
  full = pretrained.load_model(path, module, images.shape[1:])
  np.testing.assert_allclose(jax.jit(apply)(full, images), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_cut_network_is_refused(tmp_path, rejects):
  _, network, apply, _ = made("mlp")
  path = tmp_path / "a.safetensors"
  save_safetensors(path, {"a": np.ones(3)})
  with rejects("holds no cut network"):
    export.load_cut(path, apply)
  layout = json.dumps(network.layout[1:])
  arrays = {"params/Dense_0/bias": np.ones(3, np.float32)}
  write_safetensors(path, arrays, {"format": "jaxsms-cut-1", "layout": layout})
  with rejects("does not fit its own layout"):
    export.load_cut(path, apply)


LOAD = """
import sys, jax, numpy as np, pathlib
images = np.load(sys.argv[2])
call = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes())).call
np.save(sys.argv[3], np.concatenate([call(images[:1]), call(images[1:])]))
assert "jaxsms" not in sys.modules
"""


@pytest.mark.parametrize("name", ["resnet8", "vit_tiny"])
def test_a_stablehlo_file_runs_in_a_process_without_the_network(name, tmp_path):
  pytest.importorskip("flatbuffers")
  _, network, _, images = made(name)
  export.save_stablehlo(tmp_path / "a", network.apply, network.params, images)
  np.save(tmp_path / "images.npy", images)
  command = [sys.executable, "-c", f"import jax.export\n{LOAD}"]
  paths = [str(tmp_path / n) for n in ("a", "images.npy", "out.npy")]
  done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  expected = jax.jit(network.apply)(network.params, images)
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-4, atol=1e-5)


def test_a_cut_network_takes_batches_of_any_size_in_a_program(tmp_path):
  pytest.importorskip("flatbuffers")
  _, network, _, images = made("mlp")
  export.save_stablehlo(tmp_path / "a", network.apply, network.params, images)
  call = jax.jit(export.load_stablehlo(tmp_path / "a"))
  for n in (1, 2, 7):
    assert call(np.ones((n, *images.shape[1:]), np.float32)).shape == (n, 5)


def test_bad_programs_are_refused(tmp_path, rejects):
  pytest.importorskip("flatbuffers")
  path, ones = tmp_path / "a", np.ones((2, 3), np.float32)
  with rejects("for a batch of any size"):
    export.save_stablehlo(path, lambda p, x: x * len(range(x.shape[0])), ones, ones)
  with rejects("0 inputs are given"):
    export.save_stablehlo(path, lambda p: p, ones)
  with rejects("unknown platform 'moon'"):
    export.save_stablehlo(path, lambda p, x: x, ones, ones, platforms=("moon",))
  assert not path.exists()
  with rejects("cannot be read"):
    export.load_stablehlo(path)
  path.write_bytes(b"something else")
  with rejects("cannot be read"):
    export.load_stablehlo(path)
