"""Adapters: training, files, generation."""

import json
from pathlib import Path

import numpy as np
import pytest

import segattn
from segattn import Generator, Trainer
from test_training import KEYS, TEXT, bits

RUN = {key: value for key, value in KEYS.items() if not key.startswith("model.")}
LORA = {"r": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def base(tmp_path):
    """A model folder without the state of its run."""
    folder = Path(Trainer(None, {**KEYS, "training.seed": 3}).save(tmp_path / "whole"))
    for name in ["run.toml", "state.json", "manifest.json", "optimizer.safetensors"]:
        (folder / name).unlink()
    return folder


def adapting(base, **more):
    return Trainer(base, {**RUN, "lora": {**LORA, **more}})


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_ratios_are_one_before_the_first_update_and_only_adapters_learn(base):
    before = files(base)
    trainer, plain = adapting(base), Generator(base)
    generator = Generator(trainer)
    # B is 0 at first.
    assert bits(generator.score([TEXT])[0]) == bits(plain.score([TEXT])[0])
    for seed in range(3):
        samples = generator.generate([TEXT[:20], TEXT[:3]], max_new=20, seed=seed)
        steps = [trainer.policy_step(samples, [1.0, -0.5]) for _ in range(2)]
        assert all((ratios == 1).all() for ratios in steps[0].ratios(samples))
        assert any((ratios != 1).any() for ratios in steps[1].ratios(samples))
    assert files(base) == before
    first = trainer.step([TEXT])
    for _ in range(30):
        last = trainer.step([TEXT])
    assert last.loss < first.loss - 0.2


def test_saved_adapters_are_peft_s_and_generate_the_trainer_s_bits(base, tmp_path):
    trainer = adapting(base)
    for _ in range(3):
        trainer.step([TEXT])
    folder = Path(trainer.save(tmp_path / "run"))
    assert not (folder / "model.safetensors").exists()
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    assert settings["target_modules"] == LORA["targets"] and not settings["use_rslora"]
    names = json.loads(tensors_header((folder / "adapter_model.safetensors").read_bytes()))
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    opened, current = Generator(base, adapter=folder), Generator(trainer)
    assert bits(opened.score([TEXT])[0]) == bits(current.score([TEXT])[0])
    assert bits(opened.score([TEXT])[0]) != bits(Generator(base).score([TEXT])[0])
    a, b = (g.generate([TEXT[:9]], max_new=12, seed=5)[0] for g in (opened, current))
    assert a.tokens == b.tokens and bits(a.logprobs) == bits(b.logprobs)


def tensors_header(file):
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length]


def test_segments_are_those_that_the_adapters_were_trained_with(base, tmp_path):
    trainer = Trainer(base, {**RUN, "lora": LORA, "model.segment.segment_len": 16})
    trainer.step([TEXT])
    folder = trainer.save(tmp_path / "run")
    opened = Generator(base, adapter=folder)
    assert opened.config["segment"]["segment_len"] == 16
    assert bits(opened.score([TEXT])[0]) == bits(Generator(trainer).score([TEXT])[0])


def test_a_run_of_adapters_is_resumed_to_the_same_bits_over_the_same_weights_alone(base, tmp_path):
    whole, parted = adapting(base), adapting(base)
    for _ in range(2):
        whole.step([TEXT])
        parted.step([TEXT])
    parted.save(tmp_path / "run")
    moved = base.rename(tmp_path / "moved")
    resumed = Trainer.resume(tmp_path / "run", {"model.folder": str(moved)})
    a, b = whole.step([TEXT]), resumed.step([TEXT])
    assert a.step == b.step == 2 and bits(a.logprobs[0]) == bits(b.logprobs[0]) and a.grad_norm == b.grad_norm
    refused(lambda: Trainer.resume(tmp_path / "run", {"model.folder": str(moved), "lora.r": 2}), "lora", "got others")
    other = Trainer(None, {**KEYS, "training.seed": 4}).save(tmp_path / "other")
    refused(lambda: Trainer.resume(tmp_path / "run", {"model.folder": other}), "model.folder", "got others")


def test_a_run_of_whole_weights_does_not_go_on_with_adapters_or_another_model(tmp_path):
    trainer = Trainer(None, KEYS)
    trainer.step([TEXT])
    trainer.save(tmp_path)
    refused(lambda: Trainer.resume(tmp_path, {"model.segment.segment_len": 16}), "model", "got others")
    refused(lambda: Trainer.resume(tmp_path, {"lora.r": 2}), "model.folder", "a model folder")


def refused(call, argument, message):
    with pytest.raises(segattn.ArgumentError, match=message) as caught:
        call()
    assert caught.value.argument == argument


def test_tables_are_their_dotted_keys(base):
    dotted = {f"lora.{key}": value for key, value in LORA.items()}
    a, b = adapting(base), Trainer(base, {**RUN, **dotted})
    for _ in range(2):
        a.step([TEXT])
        b.step([TEXT])
    assert bits(Generator(a).score([TEXT])[0]) == bits(Generator(b).score([TEXT])[0])
    # The rank-stabilized factor is another one.
    c = adapting(base, rslora=True)
    for _ in range(2):
        c.step([TEXT])
    assert bits(Generator(a).score([TEXT])[0]) != bits(Generator(c).score([TEXT])[0])


@pytest.mark.parametrize(
    "more, argument, message",
    [
        ({"r": 0}, "lora.r", "got 0"),
        ({"r": -1}, "lora.r", "got"),
        ({"r": None}, "lora.r", "a rank, since other keys of the section are given, got none"),
        ({"alpha": np.inf}, "lora.alpha", "got"),
        ({"targets": ["nothing"]}, "lora.targets", "got .*nothing"),
        ({"dropout": 0.1}, "lora.dropout", "got 0.1"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save", "got lm_head"),
        ({"rank": 4}, "lora.rank", "got `rank`"),
    ],
)
def test_wrong_keys_are_named(base, more, argument, message):
    refused(lambda: adapting(base, **more), argument, message)


def test_wrong_adapters_are_named(base, tmp_path):
    trainer = adapting(base)
    refused(lambda: Generator(trainer, adapter=base), "adapter", "none beside a trainer")
    refused(lambda: Trainer(None, {**KEYS, "lora": LORA}), "model.folder", "got none")
    folder = Path(trainer.save(tmp_path / "run"))
    with pytest.raises(segattn.Error, match="adapter_config.json"):
        Generator(base, adapter=base)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "use_dora": True}))
    refused(lambda: Generator(base, adapter=folder), "adapter.use_dora", "got true")
    path.write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(segattn.Error, match="expected adapter_model.safetensors"):
        Generator(base, adapter=folder)
    # A folder of adapters is no model.
    with pytest.raises(segattn.Error):
        Generator(folder)
