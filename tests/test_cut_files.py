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
from jaxsms.disk import cut_files, npz
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


@pytest.mark.torch
@pytest.mark.parametrize("name", EACH)
def test_pytorch_computes_the_cut_network(name, tmp_path):
  import torch

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


@pytest.mark.slow
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


LOAD_CUT = """
import sys, jax, numpy as np
from jaxsms import export, models
module = models.create(
  "resnet8", 5, width=4, convolution=jax.lax.conv_general_dilated
)
network = export.load_cut(sys.argv[1], lambda v, x: module.apply(v, x, train=False))
images = np.load(sys.argv[2])
np.save(sys.argv[3], jax.jit(network.apply)(network.params, images))
full = network.expand(network.params)
print(sum(x.size for x in jax.tree.leaves(network.params)), end=" ")
print(sum(x.size for x in jax.tree.leaves(full)))
"""


@pytest.mark.slow
def test_a_cut_network_loads_in_a_new_process(tmp_path):
  _, network, apply, images = made("resnet8")
  export.save_cut(tmp_path / "cut.safetensors", network)
  np.save(tmp_path / "images.npy", images)
  paths = [str(tmp_path / n) for n in ("cut.safetensors", "images.npy", "out.npy")]
  command = [sys.executable, "-c", LOAD_CUT, *paths]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  cut, full = map(int, done.stdout.split())
  assert cut == sum(x.size for x in jax.tree.leaves(network.params)) < full
  # Against the full network with zeros, which this process computes.
  expected = jax.jit(apply)(network.expand(network.params), images)
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-4, atol=1e-4)


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


def row_of(path, shape, **changed):
  row = {"path": path, "shape": shape, "dtype": "float32", "kept": {}, "empty": {}}
  return {**row, **changed}


ONE, THREE = np.ones(1, np.float32), np.ones(3, np.float32)
LAYOUTS = {
  "a name that is a folder, too": (
    {"a": ONE, "a/b": ONE}, [row_of("a", [1]), row_of("a/b", [1])], None
  ),
  "a shape that is not the array's": (
    {"a": ONE}, [row_of("a", [10**13])], "'a' is [1] and should be [10000000000000]"
  ),
  "a shape beyond all memory": (
    {"a": ONE}, [row_of("a", [10**13], kept={"0": [5]})], "it would take 80000.0 GB"
  ),
  "a shape that is none": ({"a": ONE}, [row_of("a", [-1])], "'a' has no shape"),
  "fewer values than positions": (
    {"a": ONE}, [row_of("a", [4], kept={"0": [0, 1, 2]})], "'a' is [1] and should be [3]"
  ),
  "fewer axes": ({"a": THREE}, [row_of("a", [1, 3])], "'a' is [3] and should be [1, 3]"),
  "negative positions": (
    {"a": THREE}, [row_of("a", [4], kept={"0": [-3, -2, -1]})], "beyond its shape"
  ),
  "positions after the end": (
    {"a": ONE}, [row_of("a", [4], kept={"0": [4]})], "beyond its shape"
  ),
  "a position twice": (
    {"a": THREE}, [row_of("a", [4], kept={"0": [0, 2, 2]})], "do not rise"
  ),
  "an axis that is not there": (
    {"a": ONE}, [row_of("a", [1], empty={"1": [0]})], "layout ('1')"
  ),
  "an array that the file lacks": (
    {"a": ONE}, [row_of("a", [1]), row_of("b", [1])], "its layout names other arrays"
  ),
  "an array twice": (
    {"a": ONE}, [row_of("a", [1])] * 2, "its layout names other arrays"
  ),
  "no rows": ({"a": ONE}, 3, "'int' object is not iterable"),
  "no end": ({"a": ONE}, "[" * 100_000, "does not fit its own layout"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_do_not_fit_are_refused(case, tmp_path, rejects):
  arrays, layout, words = LAYOUTS[case]
  path = tmp_path / "a.safetensors"
  text = layout if isinstance(layout, str) else json.dumps(layout)
  write_safetensors(path, arrays, {"format": cut_files.FORMAT, "layout": text})
  with rejects(words or "a/b lies in a leaf"):
    export.load_cut(path, lambda params, x: x)
  if words is not None:  # names are no tree there
    with rejects(words):
      pretrained.load_weights(path)


def test_what_does_not_fit_into_memory_in_full_is_refused(tmp_path, rejects, monkeypatch):
  path = tmp_path / "a.safetensors"
  layout = json.dumps([row_of("a", [1000, 1000], kept={"0": [2], "1": [3]})])
  arrays = {"a": np.full((1, 1), 7, np.float32)}
  write_safetensors(path, arrays, {"format": cut_files.FORMAT, "layout": layout})
  full = pretrained.load_weights(path)["a"]
  assert full[2, 3] == full.sum() == 7
  monkeypatch.setattr(npz, "available_memory", lambda: 3e6)
  with rejects("it would take 0.0 GB, and 0.0 GB of memory"):
    pretrained.load_weights(path)
  assert export.load_cut(path, lambda params, x: x).params["a"].shape == (1, 1)


def test_a_changed_byte_is_found_by_the_digest(tmp_path, rejects):
  _, network, apply, _ = made("mlp")
  path = tmp_path / "a.safetensors"
  export.save_cut(path, network)
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)
  for load in (lambda: export.load_cut(path, apply), lambda: pretrained.load_weights(path)):
    with rejects("its content does not have its digest"):
      load()


LOAD = """
import sys, jax, numpy as np, pathlib
images = np.load(sys.argv[2])
call = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes())).call
np.save(sys.argv[3], np.concatenate([call(images[:1]), call(images[1:])]))
assert "jaxsms" not in sys.modules
"""


@pytest.mark.slow
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
