"""The configuration of a run: its flags, what they stand for, and that nothing is lost."""

import dataclasses
import doctest
import json

import numpy as np
import pytest
from absl.flags import FLAGS
from main_job import config_of

from experiments.config import fields
from experiments.config.dense_flags import dense_schedule
from experiments.config.pruning_criteria import CRITERIA
from experiments.config.run_config import NEWER, Config
from experiments.config.run_config import config_of as restored
from experiments.methods import METHODS, baselines
from jaxsms.schedule_registry import (
  PRETRAIN_SCHEDULES,
  RETRAIN_SCHEDULES,
  PretrainSchedule,
  RetrainSchedule,
)
from jaxsms.training import retrain_learning_rates
from jaxsms.training.merging import candidate_merges


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    ((), {"model": "mlp", "hidden": (256, 256), "dropout": 0.0, "phases": 5,
          "retrain_epochs": 2, "batch_size": 20, "weight_decay": 1e-4, "stream": False}),
    (("--dataset=cifar10",), {"model": "resnet20", "hidden": None, "dropout": None,
      "phases": 3, "retrain_epochs": 5, "batch_size": 128, "weight_decay": 5e-4}),
    (("--dataset=cifar10", "--model=mlp"), {"hidden": (512,), "dropout": 0.2}),
    (("--model=resnet8", "--epochs=7"), {"hidden": None, "batch_size": 20,
                                         "budget_epochs": 7}),
    (("--dataset=imagenet2012",), {"stream": True}),
    (("--dataset=imagenet2012", "--nostream"), {"stream": False}),
    (("--vary=seed", "--values=3,1", "--ingredients=2"), {"values": (3, 1)}),
    (("--ood=fog,none,,fog",), {"ood": ("fog",), "ood_severities": (1, 2, 3, 4, 5)}),
    (("--baselines=swamp,imp,swamp",), {"baselines": ("swamp", "imp")}),
  ],
)  # fmt: skip
def test_what_flags_stand_for(words, expected):
  config = config_of(*words)
  assert {name: getattr(config, name) for name in expected} == expected


def test_flags_come_back_from_json_and_from_a_file():
  config = config_of("--baselines=imp,gmp", "--values=0.1,0.2", "--vary=weight_decay",
                     "--ingredients=2", "--save_minutes=1", "--workdir=x")  # fmt: skip
  known = config.flags()
  assert "workdir" not in known and "save_minutes" not in known
  assert restored(json.loads(json.dumps(known))).flags() == known
  assert config_of(*config.flagfile().split()).flags() == known
  for name in NEWER:
    del known[name]
  assert restored(json.loads(json.dumps(known))).flags() == config.flags()
  del known["width"]
  with pytest.raises(KeyError):
    restored(known)


def test_a_configuration_is_not_changed():
  config = config_of()
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.phases = 3
  assert dataclasses.replace(config, phases=3).phases == 3
  assert config.phases == 5


def test_every_field_has_a_flag_and_the_example_runs():
  assert all(field.metadata["flag"].help for field in dataclasses.fields(Config))
  assert doctest.testmod(fields) == doctest.TestResults(failed=0, attempted=5)


@pytest.mark.parametrize(
  ("name", "registry"),
  [
    ("criterion", CRITERIA),
    ("merge", candidate_merges()),
    ("retrain_schedule", RETRAIN_SCHEDULES),
  ],
)
def test_help_explains_all_entries_of_a_registry(name, registry):
  for entry, this in registry.items():
    assert this.title and f"{entry} ({this.title})" in FLAGS[name].help


def test_help_explains_all_baselines():
  for name in baselines():
    explained = METHODS[name].help
    assert explained and f"{name} ({explained})" in FLAGS["baselines"].help


def test_schedules_from_outside_are_values_of_their_flags(monkeypatch, rejects):
  with rejects("unknown retraining schedule"):
    config_of("--retrain_schedule=halves")
  halves = RetrainSchedule("halves", lambda phase, i, t: phase.largest / 2**i, warmup=False)
  monkeypatch.setitem(RETRAIN_SCHEDULES, "halves", halves)
  name = config_of("--retrain_schedule=halves").retrain_schedule
  lrs = retrain_learning_rates(name, np.array([0.5, 1.0]), np.array([3]))
  np.testing.assert_allclose(lrs, [[1, 0.5, 0.25]])
  with rejects("--vary=learning_rate sets the first rate of LLR: halves has its own"):
    config_of("--retrain_schedule=halves", "--vary=learning_rate", "--values=1,2",
              "--ingredients=2")  # fmt: skip

  with rejects("unknown pretraining schedule"):
    config_of("--pretrain_schedule=Falling")
  falling = PretrainSchedule(
    lambda peak_lr, steps, warmup_steps, end_lr: lambda i: peak_lr - i * end_lr, ("end_lr",)
  )
  monkeypatch.setitem(PRETRAIN_SCHEDULES, "Falling", falling)
  config = config_of("--pretrain_schedule=Falling", "--learning_rate=8", "--end_lr=2")
  schedule, _ = dense_schedule(config, 1)
  assert [schedule(i) for i in range(3)] == [8, 6, 4]
  with rejects("--pretrain_schedule=Falling takes no --decay"):
    config_of("--pretrain_schedule=Falling", "--decay=0.5")


def test_candidates_of_cut_networks_are_not_kept(rejects):
  with rejects("--save_candidates saves copies in full shapes, and --shrink cuts them"):
    config_of("--save_candidates", "--shrink", "--criterion=channels", "--model=resnet8")
  assert config_of("--save_candidates").save_candidates


FIRST = """
  dataset data_dir cache_dir augmentation stream image_size model hidden dropout width
  widening stem init epochs batch_size learning_rate momentum weight_decay
  pretrain_schedule warmup_epochs end_lr decay step_epochs milestones ingredients phases
  goal_sparsity retrain_epochs retrain_schedule merge vary values criterion scope
  n_m_group baselines budget_epochs fixed_after mask_steps rewind_epochs ood
  ood_severities landscape train_metrics mesh cpu_devices ingredients_at_once precision
  convolution remat micro_batches split_params coordinator processes process workdir
  save_minutes keep_checkpoints tensorboard allow_other_version seed seeds chunk_steps
"""


def test_flags_that_older_runs_lack_are_known():
  """A new flag goes into NEWER, or the runs of before cannot go on."""
  kept = {"save_candidates"}  # runs do not write down how they are kept
  assert set(fields.names(Config)) - set(NEWER) - kept == set(FIRST.split())
